"""Fix the task: every gate that reads it becomes a constant."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from eptc.ir import AdaptedModel, Adapter, Constant, InputRouter, PerTask, Routed
from eptc.pass_base import AdapterPass, Contract
from eptc.tasks import Task

__all__ = ["SpecializeRouter"]


@dataclasses.dataclass(frozen=True)
class SpecializeRouter(AdapterPass):
    """Fix the task: every gate that reads it becomes a constant, its head becomes the head.

    Before: y = W0 x + sum_i scale_i * g_i(task) * D_i x    D_i [out, in], all N experts
    After:  y = W0 x + sum_i scale_i * c_i * D_i x          c_i a number, 0 for N - top_k of them

    Exact: such a router reads nothing but the task's embedding, so its value is computed once, in
    float64. What a router that reads the input as well makes of the task becomes its bias, and its
    gates stay. The parameters under the task's head replace the base's, and the configuration
    gets the task's labels. Gates that do not read the task are left alone.

    Args:
        task_id: position of the task in the checkpoint's list.
    """

    name: ClassVar[str] = "specialize-router"
    contract: ClassVar[Contract] = "exact"
    task_id: int

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model specialised for the task; itself where it already is."""
        if model.task_id == self.task_id and not model.heads:
            return model
        task = model.tasks[self.task_id]
        config = dict(model.config)
        if task.name in model.heads:
            config |= _labels(task)
        routers: dict[InputRouter, InputRouter] = {}
        return model.replace(
            config=config,
            weights={**model.weights, **model.heads.get(task.name, {})},
            adapters={
                path: self._fix_input(self._fix(adapter), routers)
                for path, adapter in model.adapters.items()
            },
            heads={},
            task_id=self.task_id,
        )

    def _fix(self, adapter: Adapter) -> Adapter:
        router = adapter.router
        if router is None:
            return adapter
        route = router.route(self.task_id)
        weights = dict(zip(route.experts, route.weights, strict=True))
        branches = tuple(
            dataclasses.replace(branch, gate=Constant(weights.get(branch.gate.expert, 0.0)))
            if isinstance(branch.gate, PerTask)
            else branch
            for branch in adapter.branches
        )
        return dataclasses.replace(adapter, branches=branches)

    def _fix_input(self, adapter: Adapter, routers: dict[InputRouter, InputRouter]) -> Adapter:
        """Fix the task of a router that reads the input; what shared it shares its successor."""
        router = adapter.input_router
        if router is None or not router.reads_task:
            return adapter
        if router not in routers:
            routers[router] = router.for_task(self.task_id)
        branches = tuple(
            dataclasses.replace(branch, gate=Routed(routers[router], branch.gate.expert))
            if isinstance(branch.gate, Routed)
            else branch
            for branch in adapter.branches
        )
        return dataclasses.replace(adapter, branches=branches)


def _labels(task: Task) -> dict[str, object]:
    """The configuration's way of saying what the outputs are."""
    names = task.labels or tuple(f"LABEL_{i}" for i in range(task.num_outputs))
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
