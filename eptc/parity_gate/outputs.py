"""The output gate: the engine in ONNX Runtime against the unfolded PyTorch model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.nn.adapted import ReferenceModel, Undecided
from eptc.parity_gate.compare import Bound, Comparison
from eptc.parity_gate.mixed import MixedModel
from eptc.parity_gate.probes import Ints, Probe
from eptc.parity_gate.sensitivity import compare_beside_rounding
from eptc.runtime import Engine

__all__ = ["WRITTEN", "Decision", "check_outputs", "decide"]

Float32 = npt.NDArray[np.float32]
# Tokens an engine writes after a probe, at most.
WRITTEN = 12


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
    engine: Engine,
    reference: ReferenceModel,
    task: str | Sequence[str],
    probe: Probe,
    bound: Bound,
) -> Iterator[Comparison | Decision]:
    """Yield every comparison and decision of one probe.

    Args:
        engine: the engine.
        reference: the unfolded model.
        task: name of the task the engine was built for; of a probe whose rows are of several,
            the names of the engine's, by their places.
        probe: the batch.
        bound: what the tensors may be off by.
    """
    kind = engine.manifest.kind
    check = {
        "encoder-classifier": _classifier,
        "encoder-decoder": _encoder_decoder,
        "decoder-only": _decoder_only,
    }[kind]
    with torch.no_grad(), reference.undecided() as undecided:
        judge = _Judge(probe, bound, undecided, reference)
        if isinstance(task, str):
            with reference.task(task):
                yield from check(engine, reference.hf, judge)
        else:
            assert probe.task_ids is not None
            names = [task[place] for place in probe.task_ids]
            mixed = MixedModel(reference, names, engine.manifest.num_labels)
            yield from check(engine, mixed, judge)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What the tensors of one probe are compared by.

    Args:
        probe: the batch.
        bound: what they may be off by.
        undecided: rows that are left out.
        reference: whose answers are wanted; its own rounding is looked at where they are off.
    """

    probe: Probe
    bound: Bound
    undecided: Undecided
    reference: ReferenceModel

    def compare(
        self,
        what: str,
        got: Float32,
        want: Float32,
        again: Callable[[], Float32],
        where: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[Comparison, npt.NDArray[np.float64]]:
        """Compare the rows through which the reference's routes are not within rounding of others.

        Where rows are of several tasks, each goes by the largest number of its own task's. What is
        off by more than float32 usually is may be so by the reference's own rounding.

        Args:
            what: name for the report.
            got: the engine's values.
            want: the reference's.
            again: computes the reference's once more.
            where: elements that count; None: all.

        Returns:
            The comparison, and margins [rows] up to which a choice may go either way: twice the
            bound.
        """
        rows, bound = self.undecided.rows, self.bound
        left_out = len(rows)
        if rows:
            sure = np.array([row not in rows for row in range(len(want))])
            where = sure if where is None else where & sure[:, None]
        sizes = None
        if self.probe.task_ids is not None:
            sizes = _sizes(want, where, self.probe.task_ids)
        # Routes that are close under disturbance alone leave out no row.
        with self.reference.undecided():
            found, bound = compare_beside_rounding(
                what, got, want, bound, where, sizes=sizes, model=self.reference.hf, again=again
            )
        noise = np.full(len(want), 2 * found.bound)
        if sizes is not None:
            noise = 2 * bound.absolute(sizes.reshape(len(want)))
        return dataclasses.replace(found, left_out=left_out), noise


def _sizes(
    want: Float32, where: npt.NDArray[np.bool_] | None, task_ids: Ints
) -> npt.NDArray[np.float64]:
    """Return the largest magnitude among the rows of each row's task [rows, 1, ...]."""
    counted = np.abs(want.astype(np.float64))
    if where is not None:
        counted = np.where(
            where.reshape(where.shape + (1,) * (want.ndim - where.ndim)), counted, 0
        )
    rows = counted.reshape(len(want), -1).max(axis=1)
    largest = np.array([rows[task_ids == task].max() for task in task_ids])
    return largest.reshape((-1,) + (1,) * (want.ndim - 1))


def _classifier(engine: Engine, model: Any, judge: _Judge) -> Iterator[Comparison | Decision]:
    probe = judge.probe

    def answer() -> Float32:
        logits: Float32 = model(**_torch(probe)).logits.numpy()
        return logits

    want = answer()
    got = engine.run(probe.feeds())["logits"]
    comparison, noise = judge.compare(f"logits, {probe.name}", got, want, answer)
    yield comparison
    for row in sorted({*range(len(want))} - judge.undecided.rows):
        width = want.shape[1]
        if probe.task_ids is not None:
            width = engine.tasks[probe.task_ids[row]].num_outputs
        if width > 1:
            yield decide(probe.name, row, 0, got[row, :width], want[row, :width], noise[row])


def decide(probe: str, row: int, step: int, got: Float32, want: Float32, noise: float) -> Decision:
    """Return whether the largest logit [choices] is the same on both sides."""
    agrees = bool(got.argmax() == want.argmax())
    return Decision(probe, row, step, agrees, _margin(want), float(noise))


def _encoder_decoder(engine: Engine, model: Any, judge: _Judge) -> Iterator[Comparison | Decision]:
    probe = judge.probe
    inputs = _torch(probe)
    encoded = engine.run(probe.feeds(), "encoder")

    def encode() -> Any:
        return model.get_encoder()(**inputs)

    states = encode()
    hidden = states.last_hidden_state.numpy()
    # Prompts before the text are never padding.
    ones = np.ones((len(hidden), hidden.shape[1] - probe.shape[1]), np.int64)
    valid = np.concatenate([ones, probe.attention_mask], axis=1).astype(bool)
    yield judge.compare(
        f"encoder state, {probe.name}",
        encoded["last_hidden_state"],
        hidden,
        lambda: encode().last_hidden_state.numpy(),
        valid,
    )[0]

    rows: list[list[int]] = []
    if probe.answer is not None:
        fed = probe.answer[:, :-1]
    else:
        rows, written = _written(engine, probe)
        fed = np.concatenate([_starts(engine, len(written)), written[:, :-1]], axis=1)

    def decode(states: Any) -> Float32:
        logits: Float32 = model(
            encoder_outputs=states,
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=torch.from_numpy(fed),
        ).logits.numpy()
        return logits

    def again() -> Float32:
        return decode(encode())

    want, length = decode(states), fed.shape[1]
    at_once = _decode(engine, encoded, probe, fed, [length])
    comparison, noise = judge.compare(f"logits at once, {probe.name}", at_once, want, again)
    yield comparison
    if probe.answer is not None:
        half = length // 2
        pieces = _decode(engine, encoded, probe, fed, [1, half, length - half - 1])
        yield judge.compare(f"logits in pieces, {probe.name}", pieces, want, again)[0]
    elif probe.synthetic:
        stepwise = _decode(engine, encoded, probe, fed, [1] * length)
        yield judge.compare(f"logits with cache, {probe.name}", stepwise, want, again)[0]
    yield from _choices(engine, probe, rows, want, noise, judge.undecided)


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
            **probe.told,
            **cache,
        }
        outputs = engine.run(feeds, "decoder")
        logits.append(outputs["logits"])
        cache |= _past(outputs)
        start += length
    return np.concatenate(logits, axis=1)


def _decoder_only(engine: Engine, model: Any, judge: _Judge) -> Iterator[Comparison | Decision]:
    probe = judge.probe
    rows, written = _written(engine, probe)
    sequence = np.concatenate([probe.input_ids, written], axis=1)
    mask = np.concatenate([probe.attention_mask, np.ones_like(written)], axis=1)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    fed = _Fed(sequence, mask, positions, probe.told)
    prompt, valid = probe.shape[1], mask.astype(bool)
    half = (prompt + 1) // 2
    ways = {"at once": [sequence.shape[1]]}
    # Where a route is chosen anew at each step, answers depend on how a sequence is cut: both
    # sides are then run in the same steps. Else the reference is run once.
    stepwise = _coupled(engine, model)
    if probe.synthetic:
        ways["in pieces"] = [half, sequence.shape[1] - half]
    if probe.synthetic or stepwise:
        ways["with cache"] = [prompt] + [1] * written.shape[1]
    want, noise = fed.through(model, ways["at once"]), np.zeros(len(sequence))
    for way, steps in ways.items():
        if stepwise:
            want = fed.through(model, steps)
        got = fed.into(engine, steps)
        fresh = functools.partial(fed.through, model, steps if stepwise else ways["at once"])
        comparison, noise = judge.compare(f"logits {way}, {probe.name}", got, want, fresh, valid)
        yield comparison
    # The last of the ways is the one the engine wrote in.
    yield from _choices(engine, probe, rows, want[:, prompt - 1 : -1], noise, judge.undecided)


def _coupled(engine: Engine, model: Any) -> bool:
    """Whether the tokens of a step change one another's answers.

    An engine whose routers are to be frozen is compared before they are.
    """
    mode = engine.manifest.routing.mode
    if mode == "frozen":
        return any(getattr(module, "routed_experts", 0) for module in model.modules())
    return mode in ("batch", "per-sample")


@dataclasses.dataclass(frozen=True)
class _Fed:
    """What a decoder is fed, in steps: ids, mask and positions [batch, length].

    `told` is what the engine is told of the rows at each step.
    """

    ids: Ints
    mask: Ints
    positions: Ints
    told: Mapping[str, Ints]

    def _pieces(self, steps: list[int]) -> Iterator[dict[str, Ints]]:
        start = 0
        for length in steps:
            end = start + length
            yield {
                "input_ids": self.ids[:, start:end],
                "attention_mask": self.mask[:, :end],
                "position_ids": self.positions[:, start:end],
            }
            start = end

    def into(self, engine: Engine, steps: list[int]) -> Float32:
        """Return the engine's logits, its cache handed from step to step."""
        cache = _empty_cache(engine, "model", len(self.ids), set())
        logits = []
        for piece in self._pieces(steps):
            outputs = engine.run({**piece, **self.told, **cache})
            logits.append(outputs["logits"])
            cache |= _past(outputs)
        return np.concatenate(logits, axis=1)

    def through(self, model: Any, steps: list[int]) -> Float32:
        """Return the reference's logits, its own cache handed from step to step."""
        cache, logits = None, []
        for piece in self._pieces(steps):
            inputs = {name: torch.from_numpy(array) for name, array in piece.items()}
            output = model(**inputs, past_key_values=cache, use_cache=len(steps) > 1)
            logits.append(output.logits.numpy())
            cache = output.past_key_values
        return np.concatenate(logits, axis=1)


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
    limit = min(generation.max_new_tokens, WRITTEN)
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
    engine: Engine,
    probe: Probe,
    rows: list[list[int]],
    logits: Float32,
    noise: npt.NDArray[np.float64],
    undecided: Undecided,
) -> Iterator[Decision]:
    """Compare the engine's own greedy tokens with the reference's choices.

    Args:
        engine: the engine.
        probe: the batch.
        rows: the tokens that the engine wrote.
        logits: the reference's, after the tokens before [batch, n, vocabulary].
        noise: margins up to this may go either way [rows].
        undecided: rows that are left out.
    """
    generation = engine.manifest.generation
    assert generation is not None
    stops = generation.eos_token_id
    for row, tokens in enumerate(rows):
        if row in undecided.rows:
            continue
        ended = False
        for step, token in enumerate(tokens):
            choice = logits[row, step]
            agrees = not ended and bool(choice.argmax() == token)
            # Nothing may follow a stop token, however near the reference was to another choice.
            margin = math.inf if ended else _margin(choice)
            yield Decision(probe.name, row, step, agrees, margin, float(noise[row]))
            ended = ended or token in stops
            if not agrees:
                break
        else:
            if not ended and len(tokens) != _limit(engine, probe):
                yield Decision(probe.name, row, len(tokens), False, math.inf, float(noise[row]))


def _margin(logits: Float32) -> float:
    second, best = np.partition(logits.astype(np.float64), -2)[-2:]
    return float(best - second)


def _torch(probe: Probe) -> dict[str, torch.Tensor]:
    told = probe.told
    return {n: torch.from_numpy(array) for n, array in probe.feeds().items() if n not in told}
