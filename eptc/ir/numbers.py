"""float64 arithmetic that gives the same bits on every machine."""

from __future__ import annotations

import decimal
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eptc.errors import CheckpointError
from eptc.tensors import Array, LazyTensor, cast

__all__ = ["Float64", "eliminate", "kron", "product", "read", "rounded", "sigmoid", "softmax"]

Float64 = npt.NDArray[np.float64]


def read(tensor: LazyTensor) -> Float64:
    """Return a tensor's numbers in float64."""
    return tensor.numpy().astype(np.float64)


def rounded(array: Float64, dtype: str, what: str) -> Array:
    """Round numbers that are made of a checkpoint's once.

    Args:
        array: the numbers.
        dtype: what they are rounded to.
        what: what makes them and of which linear, for the message.

    Raises:
        CheckpointError: a number is beyond `dtype`, or none.
    """
    with np.errstate(over="ignore"):
        found = cast(array, dtype)
    if not np.isfinite(found).all():
        raise CheckpointError(
            f"{what} overflows {dtype}",
            fix="the checkpoint's kernels or alpha are beyond what it can have trained with",
        )
    return found


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


def eliminate(matrix: Float64, rank: int, zero: float = 0.0) -> tuple[Float64, Float64]:
    """Return L [rows, k] and R [k, columns] whose product is a matrix of rank k at most `rank`.

    Gaussian elimination with complete pivoting: no entry of L is above 1, and the same bits come
    out on every machine, which a singular value decomposition does not promise.

    Args:
        matrix: the matrix.
        rank: steps of elimination; what is left after them is taken for zero.
        zero: of the largest entry: it ends before that where no entry is above it.
    """
    rest = matrix.copy()
    left, right = np.zeros((matrix.shape[0], rank)), np.zeros((rank, matrix.shape[1]))
    least = zero * np.abs(matrix).max(initial=0.0)
    for step in range(rank):
        row, column = np.unravel_index(int(np.argmax(np.abs(rest))), rest.shape)
        pivot = rest[row, column]
        if not abs(pivot) > least:
            return left[:, :step], right[:step]
        left[:, step], right[step] = rest[:, column] / pivot, rest[row]
        rest -= left[:, step : step + 1] * right[step]
        rest[row], rest[:, column] = 0.0, 0.0
    return left, right


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
