"""The numbers of int8: weights with a scale for each channel, activations with a zero point."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from eptc.errors import BaseModelError, OptionError
from eptc.lower.weights import Piece, WeightTensor, split
from eptc.tensors import Array, cast, round_up

__all__ = ["FULL", "REDUCED", "activation", "ends", "integers", "quantize"]

Whole = npt.NDArray[np.int8]
Single = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

# The largest integer of a weight. -128 has no opposite, so it is not used.
FULL = 127
# Two products of it and 255 fit into 16 bits, in which x86 without VNNI adds pairs.
REDUCED = 64

# Elements that are converted at once: in float64 they fit the cache.
_BLOCK = 2**16
_SMALLEST = float(np.finfo(np.float32).tiny)


def integers(
    tensor: ir.TensorProtocol, axis: int, *, largest: int = FULL, digits: str = "float32"
) -> tuple[WeightTensor, WeightTensor]:
    """Return the lazy int8 form of a matrix: `W ~ integers * scale` along `axis`.

    Args:
        tensor: the matrix; not read before one of the two is.
        axis: 0: a scale for each row; 1: for each column.
        largest: the largest integer, `FULL` or `REDUCED`.
        digits: as for `quantize`.

    Returns:
        The integers, named and shaped like the matrix, and `<name>@scale`, float32 [channels].
    """
    shape = tuple(tensor.shape.numpy())
    compute = functools.partial(
        quantize, axis=axis, largest=largest, name=str(tensor.name), digits=digits
    )
    whole, scale = split(
        tensor,
        ("int8", axis, largest, digits),
        compute,
        [
            Piece("", ir.DataType.INT8, shape),
            Piece("scale", ir.DataType.FLOAT, (shape[axis],)),
        ],
    )
    return whole, scale


def quantize(
    matrix: Array,
    axis: int,
    *,
    largest: int = FULL,
    name: str = "the matrix",
    digits: str = "float32",
) -> tuple[Whole, Single]:
    """Round a matrix to int8, each channel in steps of its own.

    A step is the channel's largest magnitude divided by `largest`, as a float32. A number is
    divided by that float32 in float64 and rounded once, half to even, so that it moves by no
    more than half a step. A channel of zeros, or of numbers for which float32 has no step,
    has step 1.

    Args:
        matrix: [rows, columns] of any floating-point type.
        axis: 0: a step for each row; 1: for each column.
        largest: the largest integer.
        name: what an error calls the matrix.
        digits: the floating-point type that has all digits of the steps; they are rounded up to
            it, and stay float32.

    Returns:
        int8 [rows, columns] in the matrix's layout, and the steps, float32 [channels].

    Raises:
        BaseModelError: a number is not finite.
    """
    if matrix.flags.f_contiguous and not matrix.flags.c_contiguous:
        turned, scale = quantize(matrix.T, 1 - axis, largest=largest, name=name, digits=digits)
        return turned.T, scale
    whole = np.empty(matrix.shape, np.int8)
    if axis == 0:
        scale = np.empty(matrix.shape[0], np.float32)
        for rows in _blocks(matrix):
            block = _wide(matrix[rows])
            scale[rows] = _steps(_magnitudes(block, 1), largest, name, digits)
            whole[rows] = _rounded(block, scale[rows, None])
        return whole, scale
    magnitudes = np.zeros(matrix.shape[1])
    for rows in _blocks(matrix):
        np.maximum(magnitudes, _magnitudes(_single(matrix[rows]), 0), out=magnitudes)
    scale = _steps(magnitudes, largest, name, digits)
    for rows in _blocks(matrix):
        whole[rows] = _rounded(_wide(matrix[rows]), scale)
    return whole, scale


def activation(
    low: float, high: float, *, symmetric: bool, name: str
) -> tuple[Single, npt.NDArray[np.int8 | np.uint8]]:
    """Return scale (float32) and zero point of an activation, both scalars.

    The range is widened to hold zero, which padding and ReLU make often: it stays exact.

    Args:
        low: the smallest value that is represented.
        high: the largest.
        symmetric: int8 with zero point 0; otherwise uint8.
        name: what an error calls the activation.

    Raises:
        OptionError: the range is not finite, or its ends are in the wrong order.
    """
    low, high = ends(low, high, name=name)
    scale = np.float32(max(-low, high) / FULL if symmetric else (high - low) / 255)
    if scale < _SMALLEST:
        scale = np.float32(1)
    if symmetric:
        return np.asarray(scale), np.asarray(0, np.int8)
    return np.asarray(scale), np.asarray(min(255, round(-low / float(scale))), np.uint8)


def ends(low: float, high: float, *, name: str) -> tuple[float, float]:
    """Return the ends of a range, widened to hold zero.

    Raises:
        OptionError: they are not finite, or in the wrong order.
    """
    with np.errstate(over="ignore"):
        single = np.array([low, high], np.float32)
    if not (np.isfinite(single).all() and low <= high):
        raise OptionError(
            f"the range of {name} is {low} to {high}",
            expected="two finite numbers, the smaller one first",
            fix="calibrate on inputs for which the float32 engine's values are finite",
        )
    return min(low, 0.0), max(high, 0.0)


def _blocks(matrix: Array) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _single(block: Array) -> Array:
    """Widen 16-bit numbers, with which numpy is slow; no number changes."""
    return cast(block, "float32") if block.itemsize == 2 else block


def _wide(block: Array) -> Double:
    """Return a float64 copy, to be written to."""
    return _single(block).astype(np.float64)


def _magnitudes(block: Array, axis: int) -> Double:
    high, low = block.max(axis=axis, initial=0), block.min(axis=axis, initial=0)
    largest: Double = np.maximum(high, -low).astype(np.float64)
    return largest


def _steps(magnitudes: Double, largest: int, name: str, digits: str) -> Single:
    """Return the float32 step of each channel."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale: Single = (magnitudes / largest).astype(np.float32)
    if not np.isfinite(scale).all():
        raise BaseModelError(
            f"{name} has numbers that are not finite in float32",
            expected="finite weights",
            fix="check the base and the checkpoint for NaN and infinity",
        )
    scale[scale < _SMALLEST] = 1
    return round_up(scale, digits)


def _rounded(block: Double, scale: Single) -> Double:
    """Return whole steps; `block` is overwritten."""
    np.divide(block, scale, out=block)
    return np.rint(block, out=block)
