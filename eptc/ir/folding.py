"""Branches with constant gates, added to the weight of their linear."""

from __future__ import annotations

import functools

import numpy as np

from eptc.ir.model import Adapter
from eptc.ir.numbers import rounded
from eptc.tensors import Array, ComputedTensor, LazyTensor, numpy_dtype

__all__ = ["folded"]

# Bytes of float64 that are summed and rounded at once.
_BLOCK = 512 * 1024


def folded(base: LazyTensor, adapter: Adapter, dtype: str) -> ComputedTensor:
    """Return W0 + sum_i scale_i * c_i * D_i [out, in], summed in float64 and rounded once.

    Args:
        base: W0.
        adapter: its branches' gates are all constant.
        dtype: type of the sum.

    Returns:
        A tensor that is computed each time it is asked for; computing raises CheckpointError
        where the sum overflows `dtype`.
    """
    compute = functools.partial(_fold, base, adapter, dtype)
    return ComputedTensor(base.name, dtype, base.shape, compute)


def _fold(base: LazyTensor, adapter: Adapter, dtype: str) -> Array:
    weight = base.numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        delta = adapter.delta_reader(None)
    what = f"folding the experts of {adapter.target} into its weight"
    total = np.empty(weight.shape, numpy_dtype(dtype))
    # A few rows at a time: their float64 sums stay in the processor's cache.
    step = max(1, _BLOCK // max(1, 8 * weight.shape[1]))
    for start in range(0, len(weight), step):
        stop = min(start + step, len(weight))
        with np.errstate(over="ignore", invalid="ignore"):
            rows = delta(start, stop)
            np.add(rows, weight[start:stop], out=rows, dtype=np.float64)
        total[start:stop] = rounded(rows, dtype, what)
    return total
