"""Both sides of a model block by block: the reference's state goes in, and must come out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.errors import ParityError
from eptc.lower.weights import PACKED
from eptc.nn.adapted import ReferenceModel
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.block_probes import Batch
from eptc.parity_gate.block_runs import Runner, as_past
from eptc.parity_gate.compare import FP32, Bound, Comparison, compare, not_run
from eptc.parity_gate.outputs import Decision, decide
from eptc.parity_gate.partition import AFTER, BEFORE, Partition
from eptc.parity_gate.stored import Quantized

__all__ = ["STATE", "Outcome", "Walk"]

Float32 = npt.NDArray[np.float32]
Outcome = Comparison | Decision
# Decoded at once.
_ROWS = 256
STATE = Bound(
    3e-5,
    1e-3,
    "float32 on both sides of one block, as a part of the token's largest number before or after "
    "it: sums in another order move elements by up to 2e-6 of that over the tested models",
)


class Walk:
    """Both sides, from the tokens to the logits, one part after the other."""

    def __init__(
        self,
        reference: StreamedModel,
        task_id: int,
        runners: Mapping[str, Runner],
        batches: Sequence[Batch],
    ) -> None:
        self._reference = reference
        self._runners = runners
        self._batches = batches
        self._role = {
            block: role for role, runner in runners.items() for block in runner.partition.blocks
        }
        partitions = [runner.partition for runner in runners.values()]
        self.stored = _stored(reference, task_id, partitions)
        self._task_id = task_id
        self._encoded: Sequence[Float32] = ()
        self._tokens: dict[int, int] = {}  # that the engine's last part gave, by batch

    def outcomes(self, progress: Callable[[str], None]) -> Iterator[list[Outcome]]:
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
                bound = FP32
                outcomes += _logits(what, batch, role, made["logits"], after[i], bound)
                continue
            got: Float32 = np.sum([made[value] for value in part.result], axis=0)
            self._tokens[i] = got.shape[1]
            want, old, valid = after[i], None if before is None else before[i], batch.valid[role]
            if batch.decided is None and name == runner.partition.blocks[-1] and len(got[0]) == 1:
                # A class follows from the first token: the last block may make that one alone.
                want, old, valid = want[:, :1], None if old is None else old[:, :1], None
            sizes = _by_token(want if old is None else np.maximum(np.abs(old), np.abs(want)))
            outcomes.append(compare(what, got, want, STATE, valid, sizes=sizes))
        return outcomes


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


def _stored(
    reference: StreamedModel, task_id: int, partitions: Iterable[Partition]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return what gives the engine's own weight of each module, where it is stored in fewer bits.

    What rounding moves is seen where the weights are compared, each with the sum of base and
    experts. In a block's state it would hide what else is wrong, so the reference computes with
    the weights that were found to be right. 16-bit weights of the base are the reference's own.
    """
    partitions = list(partitions)
    model = reference.model
    modules = _modules(reference, task_id, {n for each in partitions for n in each.weights})
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for partition in partitions:
        for name, kind in {**partition.narrow, **partition.quantized}.items():
            parts = name.split(PACKED)
            widths = [_width(model, modules, part) for part in parts] if len(parts) > 1 else []
            for position, part in enumerate(parts):
                paths = modules.get(part, [])
                adapted = any(path in model.layers for path in paths)
                if kind == reference.dtype(part) and not adapted:
                    continue
                start = sum(widths[:position])
                place = (start, widths[position]) if widths else None
                step = (
                    functools.partial(_decoded, kind, place)
                    if isinstance(kind, Quantized)
                    else functools.partial(_as_stored, partition, name, place)
                )
                found |= dict.fromkeys(paths, step)
    return found


def _modules(reference: StreamedModel, task_id: int, stored: set[str]) -> dict[str, list[str]]:
    """Return which modules compute with a weight, by its name in the plain task model.

    Args:
        reference: the model.
        task_id: the task, by its own list.
        stored: names of the engine's weights; a tied one that is stored for itself is not shared.
    """
    layers = reference.model.layers
    own: dict[str, str] = {}
    for full, _ in reference.model.hf.named_parameters(remove_duplicate=False):
        name = reference.model.plain_name(full, task_id)
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            own[name] = path if path in layers else full.removesuffix(".weight")
    return {
        name: [
            own[twin]
            for twin in reference.twins(name)
            if twin == name or (twin in own and twin not in stored and own[twin] not in layers)
        ]
        for name in own
    }


def _width(model: ReferenceModel, modules: Mapping[str, list[str]], name: str) -> int:
    return int(model.hf.get_submodule(modules[name][0]).out_features)


def _decoded(weight: Quantized, place: tuple[int, int] | None, own: torch.Tensor) -> torch.Tensor:
    """Return a weight stored as integers as float32, decoded some rows at a time."""
    decoder = weight.open() if place is None else weight.open().part(*place)
    decoded = torch.empty_like(own)
    for start in range(0, len(own), _ROWS):
        part = slice(start, start + _ROWS)
        decoded[part] = torch.from_numpy(decoder.rows(part, own.shape[1]).numbers)
    return decoded


def _as_stored(
    partition: Partition, name: str, place: tuple[int, int] | None, own: torch.Tensor
) -> torch.Tensor:
    """Return a stored weight the way round that is nearer to the reference's own."""
    array = partition.read(name).astype(np.float32)
    if place is not None:
        array = array[:, place[0] : sum(place)].copy()
    found = torch.from_numpy(array)
    if found.shape != own.shape:
        return found.T
    if found.shape == own.shape[::-1] and (found - own).abs().sum() > (found.T - own).abs().sum():
        return found.T
    return found


def _by_token(state: Float32) -> Float32:
    """Return each token's largest magnitude [batch, tokens, 1].

    A trained model's state may be thousands of times larger at its first token than at the rest.
    """
    largest: Float32 = np.abs(state).max(axis=-1, keepdims=True)
    return largest


def _numpy(tensors: Iterable[Any]) -> list[Float32]:
    return [tensor.numpy() for tensor in tensors]
