"""Adapted models: linears, the branches beside them, and the tasks they serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eptc.errors import InternalError
from eptc.ir.deltas import Delta, Rows
from eptc.ir.numbers import Float64
from eptc.ir.prompts import PromptLayout
from eptc.ir.routing import InputRouter, TaskRouter
from eptc.tasks import Task
from eptc.tensors import LazyTensor

__all__ = ["AdaptedModel", "Adapter", "Branch", "Constant", "Gate", "OfTask", "PerTask", "Routed"]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A gate that depends on nothing: the number `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True, eq=False)
class PerTask:
    """A gate that depends on the task: the router's weight for one expert.

    Args:
        router: the router of the adapted linear, shared by its branches.
        expert: which expert the branch holds.
    """

    router: TaskRouter
    expert: int


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """A gate that depends on the input: the router's weight for one expert.

    Args:
        router: shared by the branches of an adapter, and by linears that follow one site.
        expert: which expert the branch holds.
    """

    router: InputRouter
    expert: int


@dataclasses.dataclass(frozen=True)
class OfTask:
    """A gate that is 1 for one task and 0 for every other.

    Args:
        task_id: the task.
    """

    task_id: int


Gate = Constant | PerTask | Routed | OfTask


@dataclasses.dataclass(frozen=True)
class Branch:
    """scale * gate * delta; `scale` has no unit."""

    delta: Delta
    gate: Gate
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The branches beside one linear.

    Args:
        target: path of the linear's module; its weight is the parameter `<target>.weight`.
        branches: the branches; empty once they are folded.
    """

    target: str
    branches: tuple[Branch, ...]

    @property
    def parameter(self) -> str:
        """Name of the weight the branches stand beside."""
        return f"{self.target}.weight"

    @property
    def router(self) -> TaskRouter | None:
        """The router that reads the task, None where no gate does."""
        for branch in self.branches:
            if isinstance(branch.gate, PerTask):
                return branch.gate.router
        return None

    @property
    def input_router(self) -> InputRouter | None:
        """The router that reads the input, None where no gate does."""
        for branch in self.branches:
            if isinstance(branch.gate, Routed):
                return branch.gate.router
        return None

    def factors(
        self, task_id: int | None, gates: Sequence[float] | None = None
    ) -> tuple[float, ...]:
        """Return scale * gate of each branch.

        Args:
            task_id: the task.
            gates: of each expert, where a router reads the input.

        Raises:
            InternalError: a gate depends on the task, or on the input, and none is given.
        """
        weights: Mapping[int, float] = {}
        if self.input_router is not None:
            if gates is None:
                raise InternalError(
                    f"the routed adapter at {self.target} was asked without an input"
                )
            weights = dict(enumerate(gates))
        if task_id is None and any(_reads_task(branch.gate) for branch in self.branches):
            raise InternalError(f"the routed adapter at {self.target} was asked without a task")
        if (router := self.router) is not None:
            assert task_id is not None
            route = router.route(task_id)
            weights = dict(zip(route.experts, route.weights, strict=True))

        def value(gate: Gate) -> float:
            if isinstance(gate, Constant):
                return gate.factor
            if isinstance(gate, OfTask):
                return float(gate.task_id == task_id)
            return weights.get(gate.expert, 0.0)

        return tuple(branch.scale * value(branch.gate) for branch in self.branches)

    def delta(self, task_id: int | None) -> Float64:
        """Return the sum of the branches [out, in] in float64; zero where there are none."""
        return self.delta_reader(task_id)(0, self.branches[0].delta.out_features)

    def delta_reader(self, task_id: int | None) -> Rows:
        """Return what computes rows start to stop of the sum of the branches.

        All [stop - start, in] of them, in float64; the branches' tensors are read once, here.
        """
        width = self.branches[0].delta.in_features
        parts = [
            (factor, branch.delta.reader())
            for factor, branch in zip(self.factors(task_id), self.branches, strict=True)
            if factor != 0.0
        ]

        def rows(start: int, stop: int) -> Float64:
            total = np.zeros((stop - start, width))
            for factor, part in parts:
                found = part(start, stop)
                total[: found.shape[0], : found.shape[1]] += factor * found
            return total

        return rows


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """A base model, the adapters beside its linears, and the tasks it was trained for.

    Args:
        config: the base's Hugging Face configuration as JSON values.
        weights: every parameter of the task model by its name there; lazy, tied ones once.
        adapters: by the path of their linear.
        heads: parameters that replace the base's, by task name, then parameter name.
        tasks: in the order of their ids.
        task_id: the task the model is specialised for; None while it serves all.
        prompts: the prompts before the text; their parameters are among `weights`.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, LazyTensor]
    adapters: Mapping[str, Adapter]
    heads: Mapping[str, Mapping[str, LazyTensor]]
    tasks: tuple[Task, ...]
    task_id: int | None = None
    prompts: PromptLayout | None = None

    @property
    def task(self) -> Task | None:
        """The task the model is specialised for."""
        return None if self.task_id is None else self.tasks[self.task_id]

    def replace(self, **changes: Any) -> AdaptedModel:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def map_adapters(self, rewrite: Callable[[Adapter], Adapter]) -> AdaptedModel:
        """Return the model with every adapter rewritten; itself where that changed none."""
        adapters = {path: rewrite(adapter) for path, adapter in self.adapters.items()}
        if all(adapters[path] is adapter for path, adapter in self.adapters.items()):
            return self
        return self.replace(adapters=adapters)

    def validate(self) -> None:
        """Check the invariants every pass must keep.

        Raises:
            InternalError: an adapter without its weight or of another shape, a task id or head
                that names no task, a gate that needs a task after the task was fixed, routers of
                two kinds beside one linear.
        """
        if self.task_id is not None and not 0 <= self.task_id < len(self.tasks):
            raise InternalError(f"task id {self.task_id} of {len(self.tasks)} tasks")
        names = {task.name for task in self.tasks}
        if unknown := [name for name in self.heads if name not in names]:
            raise InternalError(f"a head names the unknown task {unknown[0]!r}")
        for path, adapter in self.adapters.items():
            if adapter.target != path or adapter.parameter not in self.weights:
                raise InternalError(f"the adapter at {path!r} has no weight")
            shape = self.weights[adapter.parameter].shape
            routers = {id(b.gate.router) for b in adapter.branches if isinstance(b.gate, Routed)}
            if len(routers) + (adapter.router is not None) > 1:
                raise InternalError(f"{path} has {len(routers)} routers that read its input")
            for branch in adapter.branches:
                if (branch.delta.out_features, branch.delta.in_features) != shape:
                    raise InternalError(f"a branch at {path} does not fit its weight {shape}")
                if self.task_id is not None and _reads_task(branch.gate):
                    raise InternalError(
                        f"{path} has a {type(branch.gate).__name__} gate left that reads the task"
                    )


def _reads_task(gate: Gate) -> bool:
    if isinstance(gate, Routed):
        return gate.router.reads_task
    return isinstance(gate, PerTask | OfTask)
