"""Fold constant branches into the weight of their linear."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from eptc.ir import AdaptedModel, Adapter, Constant
from eptc.ir.folding import folded
from eptc.pass_base import AdapterPass, Contract

__all__ = ["FoldPyramid"]


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
        constant = {path: a for path, a in model.adapters.items() if _foldable(a)}
        if not constant:
            return model
        weights = dict(model.weights)
        for adapter in constant.values():
            base = weights[adapter.parameter]
            weights[adapter.parameter] = folded(base, adapter, self.dtype or base.dtype)
        emptied = {path: dataclasses.replace(a, branches=()) for path, a in constant.items()}
        return model.replace(weights=weights, adapters={**model.adapters, **emptied})


def _foldable(adapter: Adapter) -> bool:
    return bool(adapter.branches) and all(
        isinstance(branch.gate, Constant) for branch in adapter.branches
    )
