"""Sum the constant branches of a linear into one low rank, as small as it can be."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

from eptc.ir import AdaptedModel, Adapter, Branch, Constant, LowRank, minimal_factors
from eptc.pass_base import AdapterPass, Contract
from eptc.tensors import Array, ComputedTensor, cast

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
        adapters = {path: self._factor(adapter) for path, adapter in model.adapters.items()}
        if all(adapters[path] is model.adapters[path] for path in adapters):
            return model
        return model.replace(adapters=adapters)

    def _factor(self, adapter: Adapter) -> Adapter:
        gates = [branch.gate for branch in adapter.branches]
        if not gates or not all(isinstance(gate, Constant) for gate in gates) or _is_one(adapter):
            return adapter
        rank = minimal_factors(adapter, None)[0].shape[1]
        if rank == 0:
            return dataclasses.replace(adapter, branches=())
        first = adapter.branches[0].delta
        out, columns = first.out_features, first.in_features
        # Computed anew for each: kept, those of all linears would be as large as the model.
        a, b = (
            ComputedTensor(
                f"{adapter.target}.{name}", self.dtype, shape,
                functools.partial(_rounded, adapter, index, self.dtype),
            )
            for index, name, shape in ((1, "A", (rank, columns)), (0, "B", (out, rank)))
        )  # fmt: skip
        branch = Branch(LowRank(a, b, out, columns), Constant(1.0), 1.0)
        return dataclasses.replace(adapter, branches=(branch,))


def _is_one(adapter: Adapter) -> bool:
    """Whether an adapter is one plain low rank already."""
    (first, *others) = adapter.branches
    plain = isinstance(first.delta, LowRank) and first.scale == 1.0
    return plain and not others and first.gate == Constant(1.0)


def _rounded(adapter: Adapter, index: int, dtype: str) -> Array:
    return cast(minimal_factors(adapter, None)[index], dtype)
