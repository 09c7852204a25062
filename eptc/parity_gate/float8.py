"""Weights in 8-bit floating point, decoded from their bits by the gate's own code."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST", "numbers", "spacing"]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

LARGEST = 448.0


def _table() -> tuple[Float64, Float64]:
    """Return what each byte stands for in FLOAT8E4M3FN, and how far apart its neighbours are.

    A sign, four bits of exponent with bias 7, three of fraction; an exponent of zero has no
    leading one; all ones but the sign are no number, and there is no infinity.
    """
    code = np.arange(256)
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    step = 2.0 ** (np.maximum(exponent, 1) - 10)
    magnitude = (fraction + np.where(exponent > 0, 8, 0)) * step
    magnitude[(code & 127) == 127] = np.nan
    return np.where(sign, -magnitude, magnitude), step


_NUMBERS, _STEPS = _table()


def numbers(codes: Array) -> Float64:
    """Return what bytes stand for, float64 in their shape; NaN where that is no number."""
    found: Float64 = _NUMBERS[codes]
    return found


def spacing(codes: Array) -> Float64:
    """Return the distance of the next larger number, float64 in the bytes' shape."""
    found: Float64 = _STEPS[codes]
    return found
