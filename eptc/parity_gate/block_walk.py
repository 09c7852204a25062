"""Both sides of a model block by block: the reference's state goes in, and must come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eptc.errors import ParityError
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.block_probes import Batch
from eptc.parity_gate.block_runs import Runner, as_past
from eptc.parity_gate.block_weights import as_stored
from eptc.parity_gate.compare import FP32, Bound, Comparison, bound_of, compare, not_run
from eptc.parity_gate.outputs import Decision, decide
from eptc.parity_gate.partition import AFTER, BEFORE, Part

__all__ = ["STATE", "Found", "Walk", "rounded_bound"]

Float32 = npt.NDArray[np.float32]
STATE = Bound(
    3e-5,
    1e-3,
    "float32 on both sides of one block, as a part of the token's largest number before or after "
    "it: sums in another order move elements by up to 2e-6 of that over the tested models",
)


def rounded_bound(precision: str) -> Bound:
    """Return the bound of one part of an engine of some precision, run as published.

    It is that of the engine's outputs, for what a block adds to its state: beside a large state
    nothing would be seen of it. The angle may be wider: in a block of a trained model that adds
    hundreds to a few tokens, and rounds the others by that, int8 came to a cosine of 0.95.
    """
    bound = bound_of(precision)
    cosine = bound.cosine if bound == FP32 else min(bound.cosine, 0.9)
    return dataclasses.replace(bound, floor=STATE.floor, cosine=cosine)


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found for one part.

    Args:
        exact: its outcomes where activations are not rounded.
        published: those of the nodes that are published, where they round activations.
    """

    exact: Sequence[Comparison | Decision]
    published: Sequence[Comparison] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing was off."""
        return all(map(_sound, (*self.exact, *self.published)))


class Walk:
    """Both sides, from the tokens to the logits, one part after the other.

    Args:
        reference: the model.
        task_id: the task, by its own list.
        runners: the engine's graphs, by role.
        batches: what both are given.
        rounded: the bound of a part whose activations are rounded as published.
    """

    def __init__(
        self,
        reference: StreamedModel,
        task_id: int,
        runners: Mapping[str, Runner],
        batches: Sequence[Batch],
        rounded: Bound,
    ) -> None:
        self._reference = reference
        self._rounded = rounded
        self._runners = runners
        self._batches = batches
        self._role = {
            block: role for role, runner in runners.items() for block in runner.partition.blocks
        }
        partitions = [runner.partition for runner in runners.values()]
        self.stored = as_stored(reference, task_id, partitions)
        self._task_id = task_id
        self._encoded: Sequence[Float32] = ()
        self._tokens: dict[int, int] = {}  # that the engine's last part gave, by batch

    def outcomes(self, progress: Callable[[str], None]) -> Iterator[Found]:
        """Yield what was found for each part."""
        answers: list[Any] = []
        state: Sequence[Float32] = ()  # the reference's, after the last block
        role = ""
        feeds = [batch.reference for batch in self._batches]
        for visit in self._reference.run(self._task_id, feeds, answers, self.stored):
            if visit.path in self._role:
                progress(f"parity: {visit.path}")
                before, after = _numpy(visit.inputs), _numpy(visit.outputs)
                role = self._role[visit.path]
                if visit.path == self._runners[role].partition.blocks[0]:
                    yield self._compare(role, BEFORE, None, before)
                yield self._compare(role, visit.path, before, after)
                state = [new[:, : self._tokens[i]] for i, new in enumerate(after)]
            elif role == "encoder" and not self._encoded:
                # The norm that ends the encoder.
                yield self._compare(role, AFTER, state, _numpy(visit.outputs))
                self._encoded = _numpy(visit.outputs)
        progress(f"parity: {AFTER}")
        yield self._compare(role, AFTER, state, [a.logits.numpy() for a in answers])

    def _hand_over(self, role: str, part: Part, *, published: bool) -> None:
        """Give a decoder's block the keys and values that the encoder's graph caches for it."""
        if role != "decoder" or part.name not in self._role:
            return
        wanted = set(part.inputs)
        encoder = self._runners["encoder"]
        cached: list[dict[str, Any]] = [{} for _ in self._batches]
        runs = [batch.runs["encoder"][0] for batch in self._batches]
        for source in encoder.partition.parts.values():
            if not wanted.isdisjoint(as_past(dict.fromkeys(source.outputs))):
                found = encoder.run(source, runs, self._encoded, published=published)
                for cache, made in zip(cached, found, strict=True):
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
    ) -> Found:
        """Run a part on every batch in every way, and compare what it makes of the state.

        A part that rounds activations is run again as it is published, if it is sound without.

        Args:
            role: the graph.
            name: the part.
            before: the reference's state before it, by batch; None: it reads tokens.
            after: what the reference makes of it.
        """
        runner = self._runners[role]
        part = runner.partition.parts[name]
        title = name if name in self._role else f"{name} of {runner.partition.file}"
        exact: list[Comparison | Decision] = []
        try:
            for result in self._results(title, role, part, before, after, published=False):
                exact += _exact(result)
        except ParityError as error:
            exact = [not_run(f"{title}: {error.found}")]
        if not part.rounds or not Found(exact).sound:
            return Found(exact)
        title = f"{title} as published"
        try:
            results = self._results(title, role, part, before, after, published=True)
            return Found(exact, [self._rounded_off(result, name) for result in results])
        except ParityError as error:
            return Found(exact, [not_run(f"{title}: {error.found}")])

    def _results(
        self,
        title: str,
        role: str,
        part: Part,
        before: Sequence[Float32] | None,
        after: Sequence[Float32],
        *,
        published: bool,
    ) -> Iterator[_Result]:
        """Yield what a part makes of every batch in every way, beside what it should."""
        runner = self._runners[role]
        self._hand_over(role, part, published=published)
        jobs = [(i, run) for i, batch in enumerate(self._batches) for run in batch.runs[role]]
        states = [None if before is None else before[i] for i, _ in jobs]
        results = runner.run(part, [run for _, run in jobs], states, published=published)
        for (i, run), made in zip(jobs, results, strict=True):
            batch, what = self._batches[i], f"{title}, {run.what}"
            old, valid = None if before is None else before[i], batch.valid[role]
            if "logits" in made:
                valid = valid if batch.decided is not None else None
                yield _Result(batch, what, made["logits"], after[i], None, valid, decides=True)
                continue
            got: Float32 = np.sum([made[value] for value in part.result], axis=0)
            self._tokens[i] = got.shape[1]
            want = after[i]
            last = part.name == runner.partition.blocks[-1]
            if batch.decided is None and last and len(got[0]) == 1:
                # A class follows from the first token: the last block may make that one alone.
                want, old, valid = want[:, :1], None if old is None else old[:, :1], None
            yield _Result(batch, what, got, want, old, valid)

    def _rounded_off(self, result: _Result, name: str) -> Comparison:
        """Compare what a part makes as it is published; of a block, what it adds to its state."""
        got, want = result.got, result.want
        if name in self._role and result.old is not None and got.shape == want.shape:
            got, want = got - result.old, want - result.old
        return compare(result.title, got, want, self._rounded, result.valid)


@dataclasses.dataclass(frozen=True)
class _Result:
    """What a part made of one batch.

    Args:
        batch: it.
        what: the part, the way and the batch.
        got: the state, or the logits.
        want: what the reference has.
        old: the state before it; None where there is none, or the part makes logits.
        valid: which tokens count; None: all.
        decides: whether these are logits, of which choices are made.
    """

    batch: Batch
    what: str
    got: Float32
    want: Float32
    old: Float32 | None
    valid: npt.NDArray[np.bool_] | None
    decides: bool = False

    @property
    def title(self) -> str:
        """What is compared."""
        return f"logits, {self.what}" if self.decides else self.what


def _sound(outcome: Comparison | Decision) -> bool:
    return outcome.passed if isinstance(outcome, Comparison) else not outcome.flipped


def _exact(result: _Result) -> Iterator[Comparison | Decision]:
    """Yield the comparison of a state; that of logits, and of the choices made of them."""
    got, want, old = result.got, result.want, result.old
    if not result.decides:
        sizes = _by_token(want if old is None else np.maximum(np.abs(old), np.abs(want)))
        yield compare(result.what, got, want, STATE, result.valid, sizes=sizes)
        return
    comparison = compare(result.title, got, want, FP32, result.valid)
    yield comparison
    if got.shape != want.shape or want.shape[-1] == 1:
        return
    start = result.batch.decided or 0
    steps = (
        [(got, want)]
        if result.batch.decided is None
        else [(got[:, i], want[:, i]) for i in range(start, want.shape[1])]
    )
    for step, (mine, theirs) in enumerate(steps):
        for row in range(len(theirs)):
            yield decide(result.what, row, step, mine[row], theirs[row], 2 * comparison.bound)


def _by_token(state: Float32) -> Float32:
    """Return each token's largest magnitude [batch, tokens, 1].

    A trained model's state may be thousands of times larger at its first token than at the rest.
    """
    largest: Float32 = np.abs(state).max(axis=-1, keepdims=True)
    return largest


def _numpy(tensors: Iterable[Any]) -> list[Float32]:
    return [tensor.numpy() for tensor in tensors]
