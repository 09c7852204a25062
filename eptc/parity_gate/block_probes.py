"""What a model is probed with block by block: fewer tokens, answers given, in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.parity_gate.block_runs import Piece, Run
from eptc.parity_gate.probes import Ints, Probe
from eptc.runtime import Manifest

__all__ = ["Batch", "few", "make_batch"]

# Seeded tokens that follow a prompt, or that a decoder is fed: nobody writes answers here, as
# each token of them would be another pass over the weights.
_CONTINUED = 2
_FED = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """A probe as both sides take it.

    Args:
        probe: what it was made of.
        reference: what the Hugging Face model takes.
        runs: the ways it goes through each graph.
        valid: by graph, which tokens count [batch, tokens]; None: all. Padding does not.
        decided: first position whose choice of token is compared; None where labels are chosen.
    """

    probe: Probe
    reference: Mapping[str, Any]
    runs: Mapping[str, Sequence[Run]]
    valid: Mapping[str, npt.NDArray[np.bool_] | None]
    decided: int | None


def few(probes: Sequence[Probe], *, given: bool) -> list[Probe]:
    """Return the probes that tell most for their tokens.

    Seeded: the smallest, the one with most rows (padding of every length, holes in the mask), the
    longest, and the long answer. Text: the shortest and the longest together; where the caller
    gave it, all batches of several rows.
    """
    drawn = [probe for probe in probes if probe.synthetic and probe.answer is None]
    kept = {
        min(drawn, key=lambda p: p.input_ids.size).name,
        max(drawn, key=lambda p: p.shape[0]).name,
        max(drawn, key=lambda p: p.shape[1]).name,
    }
    return [
        probe
        for probe in probes
        if probe.name in kept
        or probe.answer is not None
        or (not probe.synthetic and (probe.shape[0] > 1 if given else probe.shape[0] == 2))
    ]


def make_batch(manifest: Manifest, probe: Probe) -> Batch:
    """Return a probe as the graphs of a bundle and the reference take it."""
    return {
        "encoder-classifier": _classified,
        "encoder-decoder": _translated,
        "decoder-only": _continued,
    }[manifest.kind](manifest, probe)


def _classified(_: Manifest, probe: Probe) -> Batch:
    feeds = probe.feeds()
    run = Run(f"at once, {probe.name}", [Piece(0, probe.shape[1], feeds)])
    valid = probe.attention_mask.astype(bool)
    return Batch(probe, _torch(feeds), {"model": [run]}, {"model": valid}, None)


def _translated(manifest: Manifest, probe: Probe) -> Batch:
    generation = manifest.generation
    assert generation is not None
    tokens = probe.answer
    if tokens is None:
        assert generation.decoder_start_token_id is not None
        tokens = _drawn(manifest, len(probe.input_ids), _FED)
        tokens[:, 0] = generation.decoder_start_token_id
    feeds = probe.feeds()
    fixed = {"encoder_attention_mask": probe.attention_mask}
    length = tokens.shape[1]
    half = length // 2
    runs = [
        Run(f"{how}, {probe.name}", _pieces(steps, fixed, {"input_ids": tokens}, {}))
        for how, steps in (("at once", [length]), ("in pieces", [1, half, length - half - 1]))
    ]
    encoded = Run(f"at once, {probe.name}", [Piece(0, probe.shape[1], feeds)])
    return Batch(
        probe,
        _torch({**feeds, "decoder_input_ids": tokens}),
        {"encoder": [encoded], "decoder": runs},
        {"encoder": probe.attention_mask.astype(bool), "decoder": None},
        0,
    )


def _continued(manifest: Manifest, probe: Probe) -> Batch:
    generation = manifest.generation
    assert generation is not None
    rows, prompt = probe.shape
    more = min(_CONTINUED, generation.max_new_tokens)
    tokens = np.concatenate([probe.input_ids, _drawn(manifest, rows, more)], axis=1)
    mask = np.concatenate([probe.attention_mask, np.ones((rows, more), np.int64)], axis=1)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    by_token = {"input_ids": tokens, "position_ids": positions}
    half = (prompt + 1) // 2
    runs = [
        Run(f"{how}, {probe.name}", _pieces(steps, {}, by_token, {"attention_mask": mask}))
        for how, steps in (
            ("at once", [prompt + more]),
            ("in pieces", [half, prompt - half, *[1] * more]),
        )
    ]
    return Batch(
        probe,
        _torch({**by_token, "attention_mask": mask}),
        {"model": runs},
        {"model": mask.astype(bool)},
        prompt - 1,
    )


def _pieces(
    steps: Sequence[int],
    fixed: Mapping[str, Ints],
    by_token: Mapping[str, Ints],
    up_to: Mapping[str, Ints],
) -> list[Piece]:
    """Cut arrays [batch, tokens] into steps; of `up_to`, each piece has all until its end."""
    pieces, start = [], 0
    for step in [step for step in steps if step]:
        stop = start + step
        feeds = {name: array[:, start:stop] for name, array in by_token.items()}
        feeds |= {name: array[:, :stop] for name, array in up_to.items()}
        pieces.append(Piece(start, stop, {**feeds, **fixed}))
        start = stop
    return pieces


def _drawn(manifest: Manifest, rows: int, length: int) -> Ints:
    assert manifest.vocab_size is not None
    rng = np.random.default_rng(1)
    return rng.integers(0, manifest.vocab_size, (rows, length), dtype=np.int64)


def _torch(arrays: Mapping[str, Ints]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
