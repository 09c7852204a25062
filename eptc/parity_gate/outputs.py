"""The output gate: the engine in ONNX Runtime against the unfolded PyTorch model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.compare import Bound, Comparison, compare
from eptc.parity_gate.probes import Ints, Probe
from eptc.runtime import Engine

__all__ = ["Decision", "check_outputs", "decide"]

Float32 = npt.NDArray[np.float32]
# Tokens an engine writes after a probe, at most.
_WRITTEN = 12


@dataclasses.dataclass(frozen=True)
class Decision:
    """One choice: a row's label, or a row's next token.

    Args:
        probe: where.
        row: which row.
        step: which new token; 0 for a label.
        agrees: whether engine and reference choose the same.
        margin: the reference's best logit minus its second best.
        noise: margins up to this may go either way: twice the logits' bound.
    """

    probe: str
    row: int
    step: int
    agrees: bool
    margin: float
    noise: float

    @property
    def flipped(self) -> bool:
        """Whether the engine chose otherwise where the reference was sure."""
        return not self.agrees and self.margin > self.noise


def check_outputs(
    engine: Engine, reference: ReferenceModel, task: str, probe: Probe, bound: Bound
) -> Iterator[Comparison | Decision]:
    """Yield every comparison and decision of one probe.

    Args:
        engine: the engine.
        reference: the unfolded model.
        task: name of the task the engine was built for.
        probe: the batch.
        bound: what the tensors may be off by.
    """
    kind = engine.manifest.kind
    check = {
        "encoder-classifier": _classifier,
        "encoder-decoder": _encoder_decoder,
        "decoder-only": _decoder_only,
    }[kind]
    with torch.no_grad(), reference.task(task):
        yield from check(engine, reference.hf, probe, bound)


def _classifier(
    engine: Engine, model: Any, probe: Probe, bound: Bound
) -> Iterator[Comparison | Decision]:
    want = model(**_torch(probe)).logits.numpy()
    got = engine.run(probe.feeds())["logits"]
    comparison = compare(f"logits, {probe.name}", got, want, bound)
    yield comparison
    if want.shape[1] > 1:
        for row in range(len(want)):
            yield decide(probe.name, row, 0, got[row], want[row], 2 * comparison.bound)


def decide(probe: str, row: int, step: int, got: Float32, want: Float32, noise: float) -> Decision:
    """Return whether the largest logit [choices] is the same on both sides."""
    agrees = bool(got.argmax() == want.argmax())
    return Decision(probe, row, step, agrees, _margin(want), noise)


def _encoder_decoder(
    engine: Engine, model: Any, probe: Probe, bound: Bound
) -> Iterator[Comparison | Decision]:
    inputs = _torch(probe)
    encoded = engine.run(probe.feeds(), "encoder")
    states = model.get_encoder()(**inputs)
    hidden = states.last_hidden_state.numpy()
    # Prompts before the text are never padding.
    ones = np.ones((len(hidden), hidden.shape[1] - probe.shape[1]), np.int64)
    valid = np.concatenate([ones, probe.attention_mask], axis=1).astype(bool)
    yield compare(
        f"encoder state, {probe.name}", encoded["last_hidden_state"], hidden, bound, valid
    )

    rows: list[list[int]] = []
    if probe.answer is not None:
        fed = probe.answer[:, :-1]
    else:
        rows, written = _written(engine, probe)
        fed = np.concatenate([_starts(engine, len(written)), written[:, :-1]], axis=1)
    output = model(
        encoder_outputs=states,
        attention_mask=inputs["attention_mask"],
        decoder_input_ids=torch.from_numpy(fed),
    )
    want, length = output.logits.numpy(), fed.shape[1]
    comparison = compare(
        f"logits at once, {probe.name}",
        _decode(engine, encoded, probe, fed, [length]),
        want,
        bound,
    )
    yield comparison
    if probe.answer is not None:
        half = length // 2
        pieces = _decode(engine, encoded, probe, fed, [1, half, length - half - 1])
        yield compare(f"logits in pieces, {probe.name}", pieces, want, bound)
    elif probe.synthetic:
        stepwise = _decode(engine, encoded, probe, fed, [1] * length)
        yield compare(f"logits with cache, {probe.name}", stepwise, want, bound)
    yield from _choices(engine, probe, rows, want, 2 * comparison.bound)


def _starts(engine: Engine, batch: int) -> Ints:
    generation = engine.manifest.generation
    assert generation is not None
    return np.full((batch, 1), generation.decoder_start_token_id, np.int64)


def _decode(
    engine: Engine, encoded: dict[str, Any], probe: Probe, tokens: Ints, steps: list[int]
) -> Float32:
    """Run the decoder over tokens [batch, n] in steps of the given lengths, cache in between."""
    cache = {
        name.replace("present.", "past_key_values."): value
        for name, value in encoded.items()
        if name.startswith("present.")
    }
    cache |= _empty_cache(engine, "decoder", len(tokens), set(cache))
    logits, start = [], 0
    for length in steps:
        feeds = {
            "input_ids": tokens[:, start : start + length],
            "encoder_attention_mask": probe.attention_mask,
            **cache,
        }
        outputs = engine.run(feeds, "decoder")
        logits.append(outputs["logits"])
        cache |= _past(outputs)
        start += length
    return np.concatenate(logits, axis=1)


def _decoder_only(
    engine: Engine, model: Any, probe: Probe, bound: Bound
) -> Iterator[Comparison | Decision]:
    rows, written = _written(engine, probe)
    sequence = np.concatenate([probe.input_ids, written], axis=1)
    prompt = probe.shape[1]
    mask = np.concatenate([probe.attention_mask, np.ones_like(written)], axis=1)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    output = model(
        input_ids=torch.from_numpy(sequence),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
    )
    want, valid = output.logits.numpy(), mask.astype(bool)

    def continued(steps: list[int]) -> Float32:
        cache = _empty_cache(engine, "model", len(sequence), set())
        logits, start = [], 0
        for length in steps:
            end = start + length
            feeds = {
                "input_ids": sequence[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
                **cache,
            }
            outputs = engine.run(feeds)
            logits.append(outputs["logits"])
            cache |= _past(outputs)
            start = end
        return np.concatenate(logits, axis=1)

    comparison = compare(
        f"logits at once, {probe.name}", continued([sequence.shape[1]]), want, bound, valid
    )
    yield comparison
    if probe.synthetic:
        half = (prompt + 1) // 2
        pieces = continued([half, sequence.shape[1] - half])
        yield compare(f"logits in pieces, {probe.name}", pieces, want, bound, valid)
        stepwise = continued([prompt] + [1] * written.shape[1])
        yield compare(f"logits with cache, {probe.name}", stepwise, want, bound, valid)
    yield from _choices(engine, probe, rows, want[:, prompt - 1 : -1], 2 * comparison.bound)


def _empty_cache(engine: Engine, graph: str, batch: int, given: set[str]) -> dict[str, Any]:
    """Return a cache of length 0 for every past input that is not given."""
    generation = engine.manifest.generation
    assert generation is not None
    shape = (batch, generation.num_key_value_heads, 0, generation.head_dim)
    return {
        spec.name: np.zeros(shape, np.float32)
        for spec in engine.manifest.graphs[graph].inputs
        if spec.name.startswith("past_key_values.") and spec.name not in given
    }


def _past(outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("present.", "past_key_values."): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }


def _limit(engine: Engine, probe: Probe) -> int:
    """Return how many tokens the engine writes after a probe."""
    generation = engine.manifest.generation
    assert generation is not None
    limit = min(generation.max_new_tokens, _WRITTEN)
    if generation.max_positions is not None:
        limit = min(limit, generation.max_positions - probe.shape[1])
    return max(0, limit)


def _written(engine: Engine, probe: Probe) -> tuple[list[list[int]], Ints]:
    """Return the engine's own greedy tokens: of each row, and filled up to [batch, n].

    The reference is asked about all of them at once: a row of tokens is its greedy answer if
    each is its first choice after those before it.
    """
    generation = engine.manifest.generation
    assert generation is not None
    limit = _limit(engine, probe)
    rows = engine.generate_ids(probe.feeds(), limit) if limit else [[]] * len(probe.input_ids)
    filled = np.full((len(rows), max(map(len, rows))), generation.pad_token_id, np.int64)
    for row, tokens in enumerate(rows):
        filled[row, : len(tokens)] = tokens
    return rows, filled


def _choices(
    engine: Engine, probe: Probe, rows: list[list[int]], logits: Float32, noise: float
) -> Iterator[Decision]:
    """Compare the engine's own greedy tokens with the reference's choices.

    Args:
        engine: the engine.
        probe: the batch.
        rows: the tokens that the engine wrote.
        logits: the reference's, after the tokens before [batch, n, vocabulary].
        noise: margins up to this may go either way.
    """
    generation = engine.manifest.generation
    assert generation is not None
    stops = generation.eos_token_id
    for row, tokens in enumerate(rows):
        ended = False
        for step, token in enumerate(tokens):
            choice = logits[row, step]
            agrees = not ended and bool(choice.argmax() == token)
            # Nothing may follow a stop token, however near the reference was to another choice.
            margin = math.inf if ended else _margin(choice)
            yield Decision(probe.name, row, step, agrees, margin, noise)
            ended = ended or token in stops
            if not agrees:
                break
        else:
            if not ended and len(tokens) != _limit(engine, probe):
                yield Decision(probe.name, row, len(tokens), False, math.inf, noise)


def _margin(logits: Float32) -> float:
    second, best = np.partition(logits.astype(np.float64), -2)[-2:]
    return float(best - second)


def _torch(probe: Probe) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in probe.feeds().items()}
