"""Both sides of a model block by block: the reference's state goes in, and must come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.errors import ParityError
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.block_probes import Batch
from eptc.parity_gate.block_runs import Runner, as_past
from eptc.parity_gate.compare import FP32, Bound, Comparison, compare, not_run
from eptc.parity_gate.outputs import Decision, decide
from eptc.parity_gate.partition import AFTER, BEFORE, Partition

__all__ = ["Outcome", "Walk"]

Float32 = npt.NDArray[np.float32]
Outcome = Comparison | Decision
STATE = Bound(
    3e-5,
    1e-3,
    "float32 on both sides of one block, as a part of the token's largest number before or after "
    "it: sums in another order move elements by up to 2e-6 of that over the tested models",
)

# An eighth of half a step: what one such weight in a matrix of 64 columns moves an output by.
_NEAR_TIE = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-11}


class Walk:
    """Both sides, from the tokens to the logits, one part after the other."""

    def __init__(
        self, reference: StreamedModel, runners: Mapping[str, Runner], batches: Sequence[Batch]
    ) -> None:
        self._reference = reference
        self._runners = runners
        self._batches = batches
        self._role = {
            block: role for role, runner in runners.items() for block in runner.partition.blocks
        }
        layers = reference.model.layers
        self.rounded = _rounded(layers, [runner.partition for runner in runners.values()])
        self._slack = max((_NEAR_TIE[dtype] for dtype in self.rounded.values()), default=0.0)
        self.bound = self._widened(STATE)
        self._encoded: Sequence[Float32] = ()
        self._tokens: dict[int, int] = {}  # that the engine's last part gave, by batch

    def outcomes(self, task_id: int, progress: Callable[[str], None]) -> Iterator[list[Outcome]]:
        """Yield what was found for each part."""
        answers: list[Any] = []
        state: Sequence[Float32] = ()  # the reference's, after the last block
        role = ""
        feeds = [batch.reference for batch in self._batches]
        for visit in self._reference.run(task_id, feeds, answers, self.rounded):
            if visit.path in self._role:
                progress(f"parity: {visit.path}")
                before, after = _numpy(visit.inputs), _numpy(visit.outputs)
                role = self._role[visit.path]
                if visit.path == self._runners[role].partition.blocks[0]:
                    yield self._compare(role, BEFORE, None, before)
                self._hand_over(role, visit.path)
                yield self._compare(role, visit.path, before, after)
                state = [new[:, : self._tokens[i]] for i, new in enumerate(after)]
            elif role == "encoder" and not self._encoded:
                # The norm that ends the encoder.
                yield self._compare(role, AFTER, state, _numpy(visit.outputs))
                self._encoded = _numpy(visit.outputs)
        progress(f"parity: {AFTER}")
        yield self._compare(role, AFTER, state, [a.logits.numpy() for a in answers])

    def _hand_over(self, role: str, block: str) -> None:
        """Give a decoder's block the keys and values that the encoder's graph caches for it."""
        if role != "decoder":
            return
        wanted = set(self._runners[role].partition.parts[block].inputs)
        encoder = self._runners["encoder"]
        cached: list[dict[str, Any]] = [{} for _ in self._batches]
        for part in encoder.partition.parts.values():
            if not wanted.isdisjoint(as_past(dict.fromkeys(part.outputs))):
                runs = [batch.runs["encoder"][0] for batch in self._batches]
                for cache, made in zip(
                    cached, encoder.run(part, runs, self._encoded), strict=True
                ):
                    cache |= as_past(made)
        for batch, cache in zip(self._batches, cached, strict=True):
            for run in batch.runs[role]:
                run.cached = cache

    def _compare(
        self,
        role: str,
        name: str,
        before: Sequence[Float32] | None,
        after: Sequence[Float32],
    ) -> list[Outcome]:
        """Run a part on every batch in every way, and compare what it makes of the state.

        Args:
            role: the graph.
            name: the part.
            before: the reference's state before it, by batch; None: it reads tokens.
            after: what the reference makes of it.
        """
        runner = self._runners[role]
        part = runner.partition.parts[name]
        jobs = [(i, run) for i, batch in enumerate(self._batches) for run in batch.runs[role]]
        states = [None if before is None else before[i] for i, _ in jobs]
        title = name if name in self._role else f"{name} of {runner.partition.file}"
        try:
            results = runner.run(part, [run for _, run in jobs], states)
        except ParityError as error:
            return [not_run(f"{title}: {error.found}")]
        outcomes: list[Outcome] = []
        for (i, run), made in zip(jobs, results, strict=True):
            batch, what = self._batches[i], f"{title}, {run.what}"
            if "logits" in made:
                bound = self._widened(FP32)
                outcomes += _logits(what, batch, role, made["logits"], after[i], bound)
                continue
            got: Float32 = np.sum([made[value] for value in part.result], axis=0)
            self._tokens[i] = got.shape[1]
            want, old, valid = after[i], None if before is None else before[i], batch.valid[role]
            if batch.decided is None and name == runner.partition.blocks[-1] and len(got[0]) == 1:
                # A class follows from the first token: the last block may make that one alone.
                want, old, valid = want[:, :1], None if old is None else old[:, :1], None
            sizes = _by_token(want if old is None else np.maximum(np.abs(old), np.abs(want)))
            outcomes.append(compare(what, got, want, self.bound, valid, sizes=sizes))
        return outcomes

    def _widened(self, bound: Bound) -> Bound:
        if not self._slack:
            return bound
        return dataclasses.replace(
            bound,
            relative=bound.relative + self._slack,
            why=f"{bound.why}; an adapted weight that lies between two numbers of 16 bits may be "
            "rounded to one on one side and to the other on the other",
        )


def _logits(
    what: str, batch: Batch, role: str, got: Float32, want: Float32, bound: Bound
) -> Iterator[Outcome]:
    """Yield the comparison of logits, and of the choices made of them."""
    valid = batch.valid[role] if batch.decided is not None else None
    comparison = compare(f"logits, {what}", got, want, bound, valid)
    yield comparison
    if got.shape != want.shape or want.shape[-1] == 1:
        return
    start = batch.decided or 0
    steps = (
        [(got, want)]
        if batch.decided is None
        else [(got[:, i], want[:, i]) for i in range(start, want.shape[1])]
    )
    for step, (mine, theirs) in enumerate(steps):
        for row in range(len(theirs)):
            yield decide(what, row, step, mine[row], theirs[row], 2 * comparison.bound)


def _rounded(layers: Iterable[str], partitions: Iterable[Partition]) -> dict[str, torch.dtype]:
    """Return the 16-bit types that the engine's adapted weights were rounded to, by linear.

    What that rounding moves is seen where the weights are compared. In a block's state it would
    hide what else is wrong, so the reference rounds its own sums of weight and experts.
    """
    narrow = {name: kind for graph in partitions for name, kind in graph.narrow.items()}
    return {
        path: getattr(torch, kind)
        for path in layers
        for name, kind in narrow.items()
        if f"{path}.weight" in name  # a weight packed with others is called after all of them
    }


def _by_token(state: Float32) -> Float32:
    """Return each token's largest magnitude [batch, tokens, 1].

    A trained model's state may be thousands of times larger at its first token than at the rest.
    """
    largest: Float32 = np.abs(state).max(axis=-1, keepdims=True)
    return largest


def _numpy(tensors: Iterable[Any]) -> list[Float32]:
    return [tensor.numpy() for tensor in tensors]
