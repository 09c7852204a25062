"""Fold constant branches into the weight of their linear."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from eptc.errors import CheckpointError
from eptc.ir import AdaptedModel, Adapter, Constant
from eptc.pass_base import AdapterPass, Contract
from eptc.tensors import Array, ComputedTensor, LazyTensor, cast, numpy_dtype

__all__ = ["FoldPyramid"]

# Bytes of float64 that are summed and rounded at once.
_BLOCK = 512 * 1024


@dataclasses.dataclass(frozen=True)
class FoldPyramid(AdapterPass):
    """Fold constant branches into the weight of their linear.

    Before: y = W0 x + sum_i scale_i * c_i * D_i x    W0, D_i [out, in]
    After:  y = W x                                   W = W0 + sum_i scale_i * c_i * D_i

    Exact up to rounding: the sum is formed in float64 and rounded once, to `dtype`. Lazy: a
    folded weight is computed when it is written, one at a time, and never kept. An adapter with
    a branch whose gate is not constant is left alone.

    Args:
        dtype: type of the folded weights; None: that of the weight they are folded into.
    """

    name: ClassVar[str] = "fold-pyramid"
    contract: ClassVar[Contract] = "exact"
    dtype: str | None = "float32"

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model with every constant branch in its weight; itself where none is left."""
        folded = {path: a for path, a in model.adapters.items() if _foldable(a)}
        if not folded:
            return model
        weights = dict(model.weights)
        for adapter in folded.values():
            base = weights[adapter.parameter]
            weights[adapter.parameter] = ComputedTensor(
                base.name,
                self.dtype or base.dtype,
                base.shape,
                functools.partial(_fold, base, adapter, self.dtype or base.dtype),
            )
        emptied = {path: dataclasses.replace(a, branches=()) for path, a in folded.items()}
        return model.replace(weights=weights, adapters={**model.adapters, **emptied})


def _fold(base: LazyTensor, adapter: Adapter, dtype: str) -> Array:
    weight, delta = base.numpy(), adapter.delta_reader(None)
    folded = np.empty(weight.shape, numpy_dtype(dtype))
    # A few rows at a time: their float64 sums stay in the processor's cache.
    step = max(1, _BLOCK // max(1, 8 * weight.shape[1]))
    for start in range(0, len(weight), step):
        stop = min(start + step, len(weight))
        total = delta(start, stop)
        np.add(total, weight[start:stop], out=total, dtype=np.float64)
        with np.errstate(over="ignore"):
            folded[start:stop] = cast(total, dtype)
        if not np.isfinite(folded[start:stop]).all():
            raise CheckpointError(
                f"folding the experts of {adapter.target} into its weight overflows {dtype}",
                fix="the checkpoint's kernels or alpha are beyond what it can have trained with",
            )
    return folded


def _foldable(adapter: Adapter) -> bool:
    return bool(adapter.branches) and all(
        isinstance(branch.gate, Constant) for branch in adapter.branches
    )
