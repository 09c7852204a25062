"""What the branches of a linear add for one task, as factors of the least rank."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence

import numpy as np

from eptc.ir.deltas import CellScaledLowRank, Delta, Kronecker, LowRank
from eptc.ir.model import Adapter
from eptc.ir.numbers import Float64, eliminate, product, read, rounded
from eptc.tensors import Array, ComputedTensor

__all__ = ["low_rank", "minimal_factors", "singular_values"]

# Of the size of what is summed: a singular value below it is what float64 made of a zero.
_ZERO = 2.0**-44


def low_rank(adapter: Adapter, task_id: int | None, dtype: str, name: str) -> LowRank | None:
    """Return what a linear's branches add for one task as a low rank of the least rank.

    Lazy: factors are computed when they are read, in float64, rounded once, and not kept.

    Args:
        adapter: its branches, one or more, have gates that do not read the input.
        task_id: the task; None where no gate reads it.
        dtype: type of the factors.
        name: what the factors are called, before `.A` and `.B`.

    Returns:
        None where the branches cancel. Computing a factor raises CheckpointError where it
        overflows `dtype`.

    Raises:
        CheckpointError: a factor overflows float64.
    """
    rank = minimal_factors(adapter, task_id)[0].shape[1]
    if rank == 0:
        return None
    first = adapter.branches[0].delta
    out, columns = first.out_features, first.in_features

    def factor(index: int) -> Array:
        return rounded(minimal_factors(adapter, task_id)[index], dtype, _what(adapter))

    # Computed anew for each: kept, those of all linears would be as large as the model.
    a = ComputedTensor(f"{name}.A", dtype, (rank, columns), functools.partial(factor, 1))
    b = ComputedTensor(f"{name}.B", dtype, (out, rank), functools.partial(factor, 0))
    return LowRank(a, b, out, columns)


def minimal_factors(adapter: Adapter, task_id: int | None) -> tuple[Float64, Float64]:
    """Return U [out, k] and V [k, in] with the least k: the branches' sum is U V.

    Experts that share A and have one size share their rows, and one kernel where they are
    Kronecker products; what is left is checked for rows that depend on others.

    Args:
        adapter: its branches, one or more, have gates that do not read the input.
        task_id: the task; None where no gate reads it.

    Returns:
        Factors in float64, the same to the bit on every machine; k is 0 where the branches
        cancel.

    Raises:
        CheckpointError: a factor overflows float64.
        InternalError: a gate depends on the input, or on the task and none is given.
    """
    weighed = [
        (factor, branch.delta)
        for factor, branch in zip(adapter.factors(task_id), adapter.branches, strict=True)
        if factor != 0.0
    ]
    if not weighed:
        first = adapter.branches[0].delta
        return np.zeros((first.out_features, 0)), np.zeros((0, first.in_features))
    groups: dict[object, list[tuple[float, Delta]]] = collections.defaultdict(list)
    for factor, delta in weighed:
        groups[_shared(delta)].append((factor, delta))
    with np.errstate(over="ignore", invalid="ignore"):
        left, right, sizes = zip(*(_sum(members) for members in groups.values()), strict=True)
    rounded(np.asarray(sizes), "float64", _what(adapter))  # an infinite one has no singular values
    return _minimal(np.hstack(left), np.vstack(right), sum(sizes))


def _what(adapter: Adapter) -> str:
    return f"what the experts of {adapter.target} add, as a low rank,"


def singular_values(u: Float64, v: Float64) -> Float64:
    """Return those of u [out, k] v [k, in], largest first, the product never formed."""
    core = np.linalg.qr(u).R @ np.linalg.qr(v.T).R.T
    return np.asarray(np.linalg.svd(core, compute_uv=False))


def _shared(delta: Delta) -> object:
    """Return what deltas have in common whose sum has no more rows than one of them."""
    if isinstance(delta, CellScaledLowRank | Kronecker):
        return type(delta), id(delta.A), id(delta.B), delta.size
    return id(delta)


def _sum(members: Sequence[tuple[float, Delta]]) -> tuple[Float64, Float64, float]:
    """Return factors of the weighed sum of deltas with one `_shared`, and the size of its terms.

    What terms leave where they cancel is rounding, as a fraction of their Frobenius norms.
    """
    (factor, first), *others = members
    if isinstance(first, Kronecker):
        kernels = [f * d.kernel_matrix() for f, d in members if isinstance(d, Kronecker)]
        size = _norm(read(first.B)) * _norm(read(first.A)) * sum(map(_norm, kernels))
        return *first.factors(np.sum(kernels, axis=0)), size
    u, v = first.factors()
    total, size = factor * u, abs(factor) * _norm(u)
    for other_factor, other in others:
        u = other.factors()[0]
        total, size = total + other_factor * u, size + abs(other_factor) * _norm(u)
    return total, v, size * _norm(v)


def _norm(matrix: Float64) -> float:
    return float(np.linalg.norm(matrix))


def _minimal(u: Float64, v: Float64, size: float) -> tuple[Float64, Float64]:
    """Return factors of u v with as many columns as it has rank; themselves where they have.

    Singular values say what the rank is. Their vectors do not make the factors, since the last
    bits of those depend on the processor: elimination does, in one fixed order.
    """
    rank = int(np.count_nonzero(singular_values(u, v) > _ZERO * size))
    if rank == u.shape[1]:
        return u, v
    # Rows of one size, by powers of two, which round nothing: no row hides behind another.
    scales = np.ldexp(1.0, np.frexp(np.abs(v).max(axis=1, initial=0.0))[1])[:, None]
    lower, rows = eliminate(v / scales, min(v.shape), zero=_ZERO)
    columns, upper = eliminate(product(u * scales.T, lower), rank)
    return columns, product(upper, rows)
