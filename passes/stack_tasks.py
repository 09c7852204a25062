"""Give each task a low rank of its own beside each linear."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from eptc.ir import AdaptedModel, Adapter, Branch, OfTask, low_rank
from eptc.pass_base import AdapterPass, Contract

__all__ = ["StackTasks"]


@dataclasses.dataclass(frozen=True)
class StackTasks(AdapterPass):
    """Give each task a low rank of its own beside each linear, for one engine of all of them.

    Before: y = W0 x + sum_i scale_i * g_i(task) * D_i x      D_i [out, in]
    After:  y = W0 x + sum_t [task = t] * B_t A_t x           B_t [out, k_t], A_t [k_t, in]

    Exact up to rounding: factors of the least rank are formed in float64 and rounded once, to
    `dtype`, which may move each product by two units of its last place. A task for which the
    branches of a linear cancel gets none there. Other tasks than these are forgotten. Left
    alone are a model that is specialised for a task, and a gate that reads the input.

    Args:
        task_ids: the tasks, by their position in the checkpoint's list.
        dtype: type of the factors.
    """

    name: ClassVar[str] = "stack-tasks"
    contract: ClassVar[Contract] = "exact"
    task_ids: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Take a list for the tuple: JSON has none."""
        object.__setattr__(self, "task_ids", tuple(self.task_ids))

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model with a branch for each task; itself where there is nothing to do."""
        if model.task_id is not None:
            return model
        return model.map_adapters(self._stack)

    def _stack(self, adapter: Adapter) -> Adapter:
        gates = [branch.gate for branch in adapter.branches]
        if adapter.input_router is not None or all(isinstance(gate, OfTask) for gate in gates):
            return adapter
        branches = []
        for task_id in self.task_ids:
            delta = low_rank(adapter, task_id, self.dtype, f"{adapter.target}.{task_id}")
            if delta is not None:
                branches.append(Branch(delta, OfTask(task_id), 1.0))
        return dataclasses.replace(adapter, branches=tuple(branches))

    def options(self) -> dict[str, object]:
        """Return the pass's options as JSON values."""
        return {**super().options(), "task_ids": list(self.task_ids)}
