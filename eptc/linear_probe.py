"""What adapted linears add up to on seeded rows: how passes and readers are measured."""

from __future__ import annotations

import dataclasses

import numpy as np

from eptc.ir import AdaptedModel, Float64
from eptc.tensors import Array, LazyTensor

__all__ = ["LinearOutput", "LinearProbe"]

# Elements of a weight that are float64 at once: as a whole they would be pages that the system
# gives and takes back for every linear.
_ELEMENTS = 2**18


@dataclasses.dataclass(frozen=True)
class LinearOutput:
    """Output of one adapted linear in float64, without its bias.

    Args:
        weight: what its weight contributes [rows, out].
        branches: what its branches contribute [rows, out].
        scale: sum of |w| |x| over everything that was summed: the scale of rounding.
        branch_scale: sum of |u| |v| |x| over the factors u v of the branches.
    """

    weight: Float64
    branches: Float64
    scale: Float64
    branch_scale: Float64

    @property
    def total(self) -> Float64:
        """What the linear adds up to [rows, out]."""
        return self.weight + self.branches


class LinearProbe:
    """Runs adapted linears of any stage of a model on the same rows.

    A weight is read, or computed, once for all stages that have the very same tensor.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[LazyTensor, Float64, Float64]] = {}

    def rows(self, path: str, width: int) -> Float64:
        """Return the rows [4, width] a linear is run on: standard normal, exact in float32."""
        seed = [width, *path.encode()]
        rows = np.random.default_rng(seed).standard_normal((4, width))
        return rows.astype(np.float32).astype(np.float64)

    def gates(self, path: str, num_experts: int) -> tuple[float, ...]:
        """Return the gates [experts] that stand for those of a router that reads the input."""
        seed = [num_experts, *path.encode()]
        found = np.random.default_rng(seed).uniform(0.1, 1.0, num_experts)
        return tuple(float(gate) for gate in found.astype(np.float32))

    def output(self, model: AdaptedModel, path: str, task_id: int) -> LinearOutput:
        """Return the output of a linear.

        Args:
            model: the model at some stage.
            path: the linear.
            task_id: the task, used while the model is not specialised.
        """
        adapter = model.adapters[path]
        tensor = model.weights[adapter.parameter]
        x = self.rows(path, tensor.shape[1])
        known = self._known.get(path)
        if known is None or known[0] is not tensor:
            known = self._known[path] = tensor, *_products(x, tensor.numpy())
        _, output, scale = known
        branches, terms = np.zeros_like(output), np.zeros_like(output)
        fixed = task_id if model.task_id is None else model.task_id
        router = adapter.input_router
        gates = None if router is None else self.gates(path, router.num_experts)
        for factor, branch in zip(adapter.factors(fixed, gates), adapter.branches, strict=True):
            if factor != 0.0:
                u, v = branch.delta.factors()
                branches += factor * ((x @ v.T) @ u.T)
                terms += abs(factor) * (np.abs(x) @ np.abs(v).T) @ np.abs(u).T
        return LinearOutput(output, branches, scale + np.abs(branches), terms)


def _products(x: Float64, weight: Array) -> tuple[Float64, Float64]:
    """Return x W^T and |x| |W|^T [rows, out] for a weight W [out, in], some rows at a time."""
    found, scale = (np.empty((len(x), len(weight))) for _ in range(2))
    step, sizes = max(1, _ELEMENTS // max(1, weight.shape[1])), np.abs(x)
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].astype(np.float64)
        found[:, start : start + step] = x @ rows.T
        scale[:, start : start + step] = sizes @ np.abs(rows, out=rows).T
    return found, scale
