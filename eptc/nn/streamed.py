"""The reference for a machine it does not fit on: one block of the base in memory at a time.

The model's own forward runs again and again, each time one module further: modules that were run
before give back what they gave then, the next one is loaded, runs on every batch and is dropped,
and the forward stops at the one after it. So a pass over the weights serves all batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eptc.nn.adapted import AdaptedLinear, ReferenceModel
from eptc.nn.meta_base import MetaBase
from eptc.nn.model import EptModel
from eptc.nn.reference import read_stored
from eptc.nn.sites import block_lists
from eptc.tasks import Task

__all__ = ["StreamedModel", "Visit", "stream_reference"]


@dataclasses.dataclass(frozen=True)
class Visit:
    """One module that has run.

    Args:
        path: its full name: a block, or a module outside of the blocks that owns parameters.
        inputs: its first argument, by batch.
        outputs: what it returned (the first of several tensors), by batch.
    """

    path: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


class _NotLoadedError(Exception):
    def __init__(self, path: str) -> None:
        self.path = path


class StreamedModel:
    """A reference whose base is not in memory; its adapters and heads are.

    Args:
        model: the model on the base.
        base: the base.

    Attributes:
        blocks: full names of the blocks of each stack, in order.
    """

    def __init__(self, model: ReferenceModel, base: MetaBase) -> None:
        self.model = model
        self.blocks = block_lists(model.hf, model.heads)
        self._base = base

    def twins(self, name: str) -> list[str]:
        """Return the parameters of the base that are one stored tensor with this one, and it."""
        place = self._base.stored.get(name)
        return [name, *(n for n, p in self._base.stored.items() if p == place and n != name)]

    def dtype(self, name: str) -> str | None:
        """Return the type in which a parameter of the base is stored; None where it is not."""
        return self._base.dtype(name) if name in self._base.stored else None

    @contextlib.contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Have a module's parameters in memory for a while.

        Raises:
            BaseModelError: a weight cannot be read.
        """
        with self._base.loaded(module):
            yield

    def run(
        self,
        task: str | int,
        batches: Sequence[Mapping[str, Any]],
        outputs: list[Any],
        stored: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Iterator[Visit]:
        """Run batches, yielding each module once all have passed it; nothing is loaded then.

        Args:
            task: name, alias or id.
            batches: what the Hugging Face model takes.
            outputs: what it returns for each is put here at the end.
            stored: of modules, by full name, what gives the weight to compute with for their own:
                the same as it is stored somewhere in fewer bits. That of an adapted linear is the
                sum of the base's and of the matrix that the experts stand for; linears that route
                on their input, and other adapted ones, add up two outputs.

        Raises:
            TaskError: there is no such task.
            BaseModelError: a weight cannot be read.
        """
        units = dict(_units(self.model.hf, self.blocks))
        kept = {id(p) for p in self.model.hf.parameters() if not p.is_meta}
        memory = _Memory(self.blocks)
        with torch.no_grad(), self.model.task(task), _intercepted(units, memory.recall):
            while True:
                stops = [memory.forward(self.model.hf, i, b) for i, b in enumerate(batches)]
                waiting = {stop for stop in stops if isinstance(stop, str)}
                if not waiting:
                    outputs += stops
                    return
                assert len(waiting) == 1, "batches take different ways through the model"
                path = waiting.pop()
                unit = units[path]
                with self._base.loaded(unit), _replaced(path, unit, stored or {}, kept):
                    memory.present = path
                    for i, batch in enumerate(batches):
                        memory.forward(self.model.hf, i, batch)
                    memory.present = None
                yield memory.visit(path, len(batches))


@contextlib.contextmanager
def _replaced(
    path: str, unit: nn.Module, stored: Mapping[str, Callable[[Tensor], Tensor]], kept: set[int]
) -> Iterator[None]:
    """Let the modules of a unit compute with other weights, adapted ones with theirs folded in.

    What was loaded goes with the unit; weights that are kept in memory are given back theirs.
    """
    found = [m for m in unit.named_modules(prefix=path, remove_duplicate=False) if m[0] in stored]
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for name, module in found:
            weight = module.weight
            assert isinstance(weight, Tensor)
            if id(weight) in kept:
                before.append((weight, weight.clone()))
            folded = isinstance(module, AdaptedLinear) and not module.routed_experts
            weight.copy_(stored[name](weight + module.dense() if folded else weight))
            if folded:
                module.__dict__["delta"] = _nothing
        yield
    finally:
        for weight, own in before:
            weight.copy_(own)
        for _, module in found:
            module.__dict__.pop("delta", None)


def _nothing(x: Tensor) -> Tensor:
    return x.new_zeros(())


class _Memory:
    """What the modules gave, by name, batch and how often they were called before in a forward."""

    def __init__(self, blocks: Sequence[Sequence[str]]) -> None:
        self.present: str | None = None
        self._next = {a: b for stack in blocks for a, b in itertools.pairwise(stack)}
        self._given: dict[tuple[str, int, int], Any] = {}
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._calls: dict[str, int] = {}
        self._batch = 0

    def forward(self, hf: nn.Module, index: int, batch: Mapping[str, Any]) -> Any:
        """Return the model's output, or the name of the module it has to wait for."""
        self._batch, self._calls = index, {}
        try:
            return hf(**batch)
        except _NotLoadedError as stop:
            return stop.path

    def recall(
        self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        """Return what a module gave in an earlier forward, or run it where it is present.

        Raises:
            _NotLoadedError: it has to be loaded first.
        """
        call = self._calls[path] = self._calls.get(path, -1) + 1
        key = path, self._batch, call
        if key not in self._given:
            if path != self.present:
                raise _NotLoadedError(path)
            self._inputs[path, self._batch] = args[0] if args else next(iter(named.values()))
            self._given[key] = forward(*args, **named)
        return self._given[key]

    def visit(self, path: str, batches: int) -> Visit:
        """Return what a module gave, and forget what only it needed."""
        inputs = [self._inputs.pop((path, i)) for i in range(batches)]
        last = {batch: call for name, batch, call in self._given if name == path}
        outputs = [_first(self._given[path, i, last[i]]) for i in range(batches)]
        for key in self._given:
            # The block before: no other module reads its state. NaN would betray one that does.
            if self._next.get(key[0]) == path:
                self._given[key] = _emptied(self._given[key])
        return Visit(path, inputs, outputs)


def _first(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    return tensor


def _emptied(output: Any) -> Any:
    """Return an output with the shape of its state and none of its numbers."""
    state = _first(output)
    empty = state.new_full((1,) * state.dim(), torch.nan).expand(state.shape)
    return (empty, *output[1:]) if isinstance(output, tuple) else empty


@contextlib.contextmanager
def _intercepted(units: Mapping[str, nn.Module], recall: Callable[..., Any]) -> Iterator[None]:
    """Let `recall` answer for some modules."""

    def through(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: recall(path, forward, args, named)

    try:
        for path, module in units.items():
            module.forward = through(path, module.forward)
        yield
    finally:
        for module in units.values():
            module.__dict__.pop("forward", None)


def _units(
    hf: nn.Module, blocks: Sequence[Sequence[str]], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield what is loaded as a whole: blocks, and other modules that own parameters."""
    names = {name for stack in blocks for name in stack}
    for name, module in hf.named_children():
        full = f"{path}.{name}" if path else name
        owns = any(parameter is not None for parameter in module._parameters.values())
        if full in names or isinstance(module, AdaptedLinear) or owns:
            yield full, module
        else:
            yield from _units(module, blocks, full)


def stream_reference(
    checkpoint: str | Path,
    base_dir: str | Path,
    *,
    top_k: int | None = None,
    tasks: Sequence[str | Task] | None = None,
    allow_pickle: bool = False,
) -> StreamedModel:
    """Return a checkpoint of either format on a base that is not in memory.

    Arguments and errors are those of `load_reference`.
    """
    stored = read_stored(checkpoint, top_k=top_k, tasks=tasks, allow_pickle=allow_pickle)
    base = MetaBase(Path(base_dir))
    return StreamedModel(EptModel.restore(stored, Path(base_dir), base), base)
