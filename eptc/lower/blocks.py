"""Weights as integers of 4 or 8 bits with a scale and a zero point for each block of columns.

The layout is that of ONNX Runtime's MatMulNBits and GatherBlockQuantized: a row is cut into blocks
of `size` numbers, the last one filled up with zeros, and a number is

    (code - zero point) * scale        code and zero point in 0 .. 2**bits - 1

Of 4-bit codes, and of 4-bit zero points, the one with the even index has the lower half of a byte.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt

from eptc.errors import BaseModelError, MissingExtraError
from eptc.tensors import Array

__all__ = ["PRECISIONS", "Blocks", "Method"]

Method = Literal["rtn", "k-quant"]
Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

# Numbers that are quantised at once: what is made of them fits the processor's cache.
_NUMBERS = 2**16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How matrices are quantised.

    Args:
        bits: of a code, 4 or 8.
        size: numbers in a block: a power of two, 16 or more.
        method: how scale and zero point of a block are chosen. `rtn`: so that its smallest and
            its largest number and zero are just in range; no code is further off than half a
            step. `k-quant`: as ONNX Runtime's k-quant chooses them, where the sum of squared
            errors is smaller so, else as `rtn`.

    Either way has zero points. Without them 4-bit blocks of 32 take 2 % less space and are 8 %
    less exact: measured on MiniLM's matrices, whose blocks are seldom symmetric.
    """

    bits: Literal[4, 8] = 4
    size: int = 32
    method: Method = "rtn"

    def count(self, columns: int) -> int:
        """Return how many blocks a row has."""
        return -(-columns // self.size)

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of codes (uint8), scales (float32) and zero points (uint8)."""
        count = self.count(columns)
        return (
            (rows, count, self.size * self.bits // 8),
            (rows, count),
            (rows, -(-count * self.bits // 8)),
        )

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes that a matrix takes."""
        codes, scales, zeros = self.shapes(rows, columns)
        return rows * (codes[1] * codes[2] + 4 * scales[1] + zeros[1])

    def quantize(self, matrix: Array, name: str = "a weight") -> tuple[Array, Array, Array]:
        """Quantise a matrix, some rows at a time: each row's numbers depend on that row alone.

        Each code is the nearest one to the number as it is given, float64 included: it is rounded
        once. (k-quant sees it in float32 when it chooses the scale.)

        Args:
            matrix: [rows, columns], of any floating-point type.
            name: what it is called in an error.

        Returns:
            Codes, scales and zero points, of the shapes that `shapes` gives.

        Raises:
            BaseModelError: a number is infinite or none.
            MissingExtraError: the installed ONNX Runtime has no k-quant.
        """
        rows, columns = matrix.shape
        shapes = self.shapes(rows, columns)
        codes, zeros = np.empty(shapes[0], np.uint8), np.empty(shapes[2], np.uint8)
        scales = np.empty(shapes[1], np.float32)
        padded = np.zeros((max(1, _NUMBERS // max(1, columns)), self.count(columns) * self.size))
        for start in range(0, rows, len(padded)):
            piece = slice(start, min(start + len(padded), rows))
            filled = padded[: piece.stop - start]
            filled[:, :columns] = matrix[piece]
            if not np.isfinite(filled).all():
                raise BaseModelError(f"{name} has numbers that are infinite or none")
            blocks = filled.reshape(-1, self.size)
            scale, zero = self._grid(blocks)
            scales[piece] = scale.reshape(len(filled), -1)
            codes[piece] = _pack(self._codes(blocks, scale, zero), self.bits).reshape(
                codes[piece].shape
            )
            zeros[piece] = _pack(zero.astype(np.uint8).reshape(len(filled), -1), self.bits)
        return codes, scales, zeros

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _grid(self, blocks: Float64) -> tuple[Float64, Float64]:
        """Return scale and zero point of each block [blocks, 1]; scales are float32 numbers."""
        scale, zero = self._nearest(blocks)
        if self.method == "rtn":
            return scale, zero
        better, moved = self._k_quant(blocks)
        chosen = self._errors(blocks, better, moved) < self._errors(blocks, scale, zero)
        return np.where(chosen, better, scale), np.where(chosen, moved, zero)

    def _nearest(self, blocks: Float64) -> tuple[Float64, Float64]:
        low = np.minimum(blocks.min(axis=1, keepdims=True), 0.0)
        high = np.maximum(blocks.max(axis=1, keepdims=True), 0.0)
        scale = ((high - low) / self._top).astype(np.float32).astype(np.float64)
        scale[scale == 0] = 1.0  # nothing but zeros
        return scale, np.minimum(np.rint(-low / scale), self._top)

    def _k_quant(self, blocks: Float64) -> tuple[Float64, Float64]:
        """Return what the library's k-quant chooses, and 1 and 0 where that is no scale.

        It divides by zero where all numbers are equal, and wants zero within the block's range.
        """
        try:
            from onnxruntime.quantization.neural_compressor.weight_only import (
                quant_tensor_k_quant_cpu,
            )
        except ImportError as error:
            raise MissingExtraError(
                "the installed onnxruntime has no k-quant",
                expected="onnxruntime 1.23 or newer, with onnx",
                fix="install a newer one, or use the method rtn",
            ) from error

        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            _, scale, zero = quant_tensor_k_quant_cpu(blocks, self.bits, self.size)
        sound = np.isfinite(scale) & (scale > 0)
        return np.where(sound, scale, 1.0), np.where(sound, zero, 0).astype(np.float64)

    def _codes(self, blocks: Float64, scale: Float64, zero: Float64) -> Bytes:
        codes = blocks / scale
        codes += zero
        np.rint(codes, out=codes)
        np.clip(codes, 0, self._top, out=codes)
        return codes.astype(np.uint8)

    def _errors(self, blocks: Float64, scale: Float64, zero: Float64) -> Float64:
        errors = (self._codes(blocks, scale, zero) - zero) * scale - blocks
        squared: Float64 = np.square(errors, out=errors).sum(axis=1, keepdims=True)
        return squared


# With 8 bits, scales of smaller blocks would take more of the space than they are worth; larger
# ones are coarse for activations that are rounded in the same blocks.
PRECISIONS = {"int4": Blocks(4, 32), "int8-weights": Blocks(8, 64)}


def _pack(codes: Bytes, bits: int) -> Bytes:
    """Put two codes of 4 bits into a byte along the last axis; 8-bit ones stay as they are."""
    if bits == 8:
        return codes
    even, odd = codes[:, ::2], codes[:, 1::2]
    packed = even.copy()
    packed[:, : odd.shape[1]] |= odd << 4
    return packed
