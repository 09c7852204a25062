"""float64 arithmetic that gives the same bits on every machine."""

from __future__ import annotations

import decimal
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eptc.tensors import LazyTensor

__all__ = ["Float64", "kron", "product", "read", "sigmoid", "softmax"]

Float64 = npt.NDArray[np.float64]


def read(tensor: LazyTensor) -> Float64:
    """Return a tensor's numbers in float64."""
    return tensor.numpy().astype(np.float64)


def product(u: Float64, v: Float64) -> Float64:
    """Return u v, summed in one fixed order on every machine.

    A BLAS sums in an order that depends on the processor; a weight that is folded in float64 and
    then rounded would differ in its last bit here and there.
    """
    total = np.zeros((u.shape[0], v.shape[1]))
    for column, row in zip(u.T, v, strict=True):
        total += column[:, None] * row
    return total


def kron(a: Float64, b: Float64) -> Float64:
    """Return the Kronecker product of a and b."""
    return np.asarray(np.kron(a, b), np.float64)


def softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """Return softmax in float64; exp in decimal, since exp of libm and of SIMD code differ."""
    with decimal.localcontext(prec=40):
        exact = [decimal.Decimal(value) for value in logits]
        powers = [(value - max(exact)).exp() for value in exact]
        return tuple(float(power / sum(powers)) for power in powers)


def sigmoid(values: Float64) -> Float64:
    """Return 1 / (1 + exp(-x)) of each of a few numbers, NaN of NaN; exp as in `softmax`."""
    with decimal.localcontext(prec=40):
        flat = [
            float(1 / (1 + (-decimal.Decimal(value)).exp())) if np.isfinite(value) else value
            for value in values.ravel().tolist()
        ]
    return np.array(flat).reshape(values.shape)
