"""Sum the constant branches of a linear into one low rank, as small as it can be."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from eptc.ir import (
    AdaptedModel,
    Adapter,
    Branch,
    CellScaledLowRank,
    Constant,
    Delta,
    Float64,
    Kronecker,
    LowRank,
)
from eptc.pass_base import AdapterPass, Contract
from eptc.tensors import Array, ComputedTensor, cast

__all__ = ["FactorPyramid"]

# Of the largest singular value: below it lies what float64 made of a zero.
_ZERO = 2.0**-44


@dataclasses.dataclass(frozen=True)
class FactorPyramid(AdapterPass):
    """Sum the constant branches of a linear into one low rank, as small as it can be.

    Before: y = W0 x + sum_i scale_i * c_i * D_i x    D_i [out, in]
    After:  y = W0 x + B A x                          B [out, k], A [k, in], k = rank(sum)

    Exact up to rounding: the factors are formed in float64 and rounded once, to `dtype`, which
    may move each product by two units of its last place. Experts that share A and have one size
    share their rows; a Kronecker expert whose kernel has rank q takes r q; what is left is
    minimised by the singular values. A linear whose branches cancel keeps no branch. An adapter
    with a gate that is not constant is left alone.

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
        rank = _factors(adapter)[0].shape[1]
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
    return cast(_factors(adapter)[index], dtype)


def _factors(adapter: Adapter) -> tuple[Float64, Float64]:
    """Return U [out, k] and V [k, in] with the least k: the sum of the branches is U V."""
    weighed = [
        (factor, branch.delta)
        for factor, branch in zip(adapter.factors(None), adapter.branches, strict=True)
        if factor != 0.0
    ]
    if not weighed:
        delta = adapter.branches[0].delta
        return np.zeros((delta.out_features, 0)), np.zeros((0, delta.in_features))
    groups: dict[object, list[tuple[float, Delta]]] = collections.defaultdict(list)
    for factor, delta in weighed:
        groups[_shares(delta)].append((factor, delta))
    pairs = [_group(members) for members in groups.values()]
    return _minimal(np.hstack([u for u, _ in pairs]), np.vstack([v for _, v in pairs]))


def _shares(delta: Delta) -> object:
    """Return what deltas have in common whose sum has no more rows than one of them."""
    if isinstance(delta, CellScaledLowRank | Kronecker):
        return type(delta), id(delta.A), id(delta.B), delta.size
    return id(delta)


def _group(members: Sequence[tuple[float, Delta]]) -> tuple[Float64, Float64]:
    """Return factors of the weighted sum of deltas that share what `_shares` says."""
    (factor, first), *others = members
    if isinstance(first, Kronecker):
        kernel = sum(f * d.kernel_matrix() for f, d in members if isinstance(d, Kronecker))
        return first.factors(np.asarray(kernel))
    u, v = first.factors()
    total = factor * u
    for other_factor, other in others:
        total = total + other_factor * other.factors()[0]
    return total, v


def _minimal(u: Float64, v: Float64) -> tuple[Float64, Float64]:
    """Return factors of u v with as many columns as it has rank; themselves where they have."""
    left, right = np.linalg.qr(u), np.linalg.qr(v.T)
    p, sizes, q = np.linalg.svd(left.R @ right.R.T)
    rank = int(np.count_nonzero(sizes > _ZERO * sizes.max(initial=0.0)))
    if rank == u.shape[1]:
        return u, v
    # Each side gets half of a singular value's size: neither loses digits to the other.
    halves = np.sqrt(sizes[:rank])
    return (left.Q @ p)[:, :rank] * halves, halves[:, None] * (q @ right.Q.T)[:rank]
