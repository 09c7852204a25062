"""Keep of a low rank what the largest singular values carry."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from eptc.ir import AdaptedModel, Adapter, Branch, Constant, Float64, LowRank
from eptc.ir.numbers import rounded
from eptc.pass_base import AdapterPass, Contract
from eptc.tensors import Array, ComputedTensor

__all__ = ["TruncateRank"]


@dataclasses.dataclass(frozen=True)
class TruncateRank(AdapterPass):
    """Keep of a low rank what the largest singular values carry.

    Before: y = W0 x + c B A x      B [out, k], A [k, in]
    After:  y = W0 x + B' A' x      B' [out, max_rank], A' [max_rank, in]

    Lossy: B' A' is the nearest matrix of its rank to c B A in the Frobenius norm (Eckart and
    Young, 1936). A linear whose rank is no larger is left alone.

    Args:
        max_rank: the largest rank that stays.
        dtype: type of the factors, rounded to once.
    """

    name: ClassVar[str] = "truncate-rank"
    contract: ClassVar[Contract] = "lossy"
    max_rank: int
    dtype: str = "float32"

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model with no rank above the largest; itself where none is."""
        return model.map_adapters(self._truncate)

    def _truncate(self, adapter: Adapter) -> Adapter:
        if len(adapter.branches) != 1:
            return adapter
        (branch,) = adapter.branches
        delta = branch.delta
        if (
            not isinstance(delta, LowRank)
            or not isinstance(branch.gate, Constant)
            or delta.A.shape[0] <= self.max_rank
        ):
            return adapter
        factor = branch.scale * branch.gate.factor
        a, b = (
            ComputedTensor(
                old.name, self.dtype, shape,
                functools.partial(self._factor, adapter.target, delta, factor, index),
            )
            for old, index, shape in (
                (delta.A, 1, (self.max_rank, delta.in_features)),
                (delta.B, 0, (delta.out_features, self.max_rank)),
            )
        )  # fmt: skip
        low = LowRank(a, b, delta.out_features, delta.in_features)
        return dataclasses.replace(adapter, branches=(Branch(low, Constant(1.0), 1.0),))

    def _factor(self, path: str, delta: LowRank, factor: float, index: int) -> Array:
        found = _nearest(delta, factor, self.max_rank)[index]
        return rounded(found, self.dtype, f"what the experts of {path} add, its rank cut,")


def _nearest(delta: LowRank, factor: float, rank: int) -> tuple[Float64, Float64]:
    u, v = delta.factors()
    left, right = np.linalg.qr(factor * u), np.linalg.qr(v.T)
    p, sizes, q = np.linalg.svd(left.R @ right.R.T)
    # Each side gets half of a singular value's size: neither loses digits to the other.
    halves = np.sqrt(sizes[:rank])
    return (left.Q @ p)[:, :rank] * halves, halves[:, None] * (q @ right.Q.T)[:rank]
