"""The numbers of fp8: FLOAT8E4M3FN with one scale for a tensor.

Four bits of exponent and three of mantissa: up to 448, in steps of an eighth of a power of two,
2**-9 near zero; no infinity. A floating-point type has small steps for small numbers by itself,
so that a scale for each channel gains little, and TensorRT's tensor cores take one for a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from eptc.errors import BaseModelError
from eptc.lower.int8 import ends
from eptc.lower.weights import Piece, WeightTensor, split
from eptc.tensors import Array, round_to_odd, round_up

__all__ = ["FLOAT8", "LARGEST", "ZERO", "activation_scale", "encode", "float8", "quantize_float8"]

Single = npt.NDArray[np.float32]

FLOAT8 = ir.DataType.FLOAT8E4M3FN
# The largest number of the type.
LARGEST = 448.0
# What QuantizeLinear knows the type by.
ZERO: Array = np.zeros((), ml_dtypes.float8_e4m3fn)

# Elements that are converted at once: in float64 they fit the cache.
_BLOCK = 2**16
_SMALLEST = float(np.finfo(np.float32).tiny)


def float8(
    tensor: ir.TensorProtocol, *, digits: str = "float32"
) -> tuple[WeightTensor, WeightTensor]:
    """Return the lazy fp8 form of a weight: `W ~ numbers * scale`.

    Args:
        tensor: the weight, any shape; not read before one of the two is.
        digits: as for `quantize_float8`.

    Returns:
        The numbers, named and shaped like the weight, and `<name>@scale`, float32 [].
    """
    compute = functools.partial(quantize_float8, name=str(tensor.name), digits=digits)
    pieces = [
        Piece("", FLOAT8, tuple(tensor.shape.numpy())),
        Piece("scale", ir.DataType.FLOAT, ()),
    ]
    numbers, scale = split(tensor, ("float8", digits), compute, pieces)
    return numbers, scale


def quantize_float8(
    weight: Array, *, name: str = "the weight", digits: str = "float32"
) -> tuple[Array, Single]:
    """Round a weight to fp8.

    The scale is the largest magnitude divided by 448, as a float32. A number is divided by that
    float32 in float64 and rounded once, half to even. The scale of zeros, or of numbers for which
    float32 has none, is 1.

    Args:
        weight: [rows, ...] of any floating-point type.
        name: what an error calls it.
        digits: the floating-point type that has all digits of the scale, which is rounded up to
            it, and stays float32.

    Returns:
        float8_e4m3fn in the weight's shape, and the scale, float32 [].

    Raises:
        BaseModelError: a number is not finite.
    """
    largest = max(
        (float(np.abs(weight[rows]).max(initial=0)) for rows in _rows(weight)), default=0
    )
    finite = all(np.isfinite(weight[rows]).all() for rows in _rows(weight))
    with np.errstate(over="ignore"):
        scale = np.asarray(np.float32(largest / LARGEST))
    if not (finite and np.isfinite(scale)):
        raise BaseModelError(
            f"{name} has numbers that are not finite in float32",
            expected="finite weights",
            fix="check the base and the checkpoint for NaN and infinity",
        )
    if scale < _SMALLEST:
        scale = np.asarray(np.float32(1))
    scale = round_up(scale, digits)
    numbers = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for rows in _rows(weight):
        numbers[rows] = encode(weight[rows].astype(np.float64) / float(scale))
    return numbers, scale


def encode(numbers: Array) -> Array:
    """Round numbers to fp8 once, half to even; what is beyond becomes the largest, NaN stays NaN.

    As QuantizeLinear with `saturate` rounds. ml_dtypes goes from float64 through float32, two
    roundings; rounding to odd in the first makes the second equal to one rounding.

    Args:
        numbers: of any floating-point type, any shape.
    """
    cut = np.clip(numbers.astype(np.float64), -LARGEST, LARGEST)
    return round_to_odd(cut).astype(ml_dtypes.float8_e4m3fn)


def activation_scale(low: float, high: float, *, name: str) -> Single:
    """Return the scale of an activation, float32 []: its largest magnitude becomes 448.

    Args:
        low: the smallest value that is represented.
        high: the largest.
        name: what an error calls the activation.

    Raises:
        OptionError: the range is not finite, or its ends are in the wrong order.
    """
    low, high = ends(low, high, name=name)
    scale = np.float32(max(-low, high) / LARGEST)
    return np.asarray(scale if scale >= _SMALLEST else np.float32(1))


def _rows(weight: Array) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, weight[:1].size))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
