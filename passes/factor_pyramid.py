"""Sum the constant branches of a linear into one low rank, as small as it can be."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from eptc.ir import AdaptedModel, Adapter, Branch, Constant, LowRank, low_rank
from eptc.pass_base import AdapterPass, Contract

__all__ = ["FactorPyramid"]


@dataclasses.dataclass(frozen=True)
class FactorPyramid(AdapterPass):
    """Sum the constant branches of a linear into one low rank, as small as it can be.

    Before: y = W0 x + sum_i scale_i * c_i * D_i x    D_i [out, in]
    After:  y = W0 x + B A x                          B [out, k], A [k, in], k = rank(sum)

    Exact up to rounding: the factors are formed in float64 and rounded once, to `dtype`, which
    may move each product by two units of its last place. Experts that share A and have one size
    share their rows; a Kronecker expert whose kernel has rank q takes r q; rows that depend on
    others go (`eptc.ir.minimal_factors`). A linear whose branches cancel keeps no branch. An
    adapter with a gate that is not constant is left alone.

    Args:
        dtype: type of the factors.
    """

    name: ClassVar[str] = "factor-pyramid"
    contract: ClassVar[Contract] = "exact"
    dtype: str = "float32"

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model with at most one branch beside each linear; itself where it is so."""
        return model.map_adapters(self._factor)

    def _factor(self, adapter: Adapter) -> Adapter:
        gates = [branch.gate for branch in adapter.branches]
        if not gates or not all(isinstance(gate, Constant) for gate in gates) or _is_one(adapter):
            return adapter
        delta = low_rank(adapter, None, self.dtype, adapter.target)
        branches = () if delta is None else (Branch(delta, Constant(1.0), 1.0),)
        return dataclasses.replace(adapter, branches=branches)


def _is_one(adapter: Adapter) -> bool:
    """Whether an adapter is one plain low rank already."""
    (first, *others) = adapter.branches
    plain = isinstance(first.delta, LowRank) and first.scale == 1.0
    return plain and not others and first.gate == Constant(1.0)
