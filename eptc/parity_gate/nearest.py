"""Few bits against the weight they stand for, whatever method chose their scales.

Each must stand for the nearest number there is: it is off by half a step at most, or by what lies
beyond the range. And the errors of a group that shares a scale must not be larger, in root mean
square, than half of the step that just covers the group and zero. Rounding to nearest keeps both
bounds by itself; a method that cuts off what is far out, to be nearer to the rest, keeps them as
long as that pays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eptc.errors import ParityError
from eptc.parity_gate.stored import Decoder

__all__ = ["check_nearest"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
# Compared at once: some copies in float64 should fit the processor's cache.
_ELEMENTS = 2**15
# Half a step, and what dividing by the step in float32 may add to it.
_HALF = 0.5 + 2.0**-10


def check_nearest(name: str, found: Decoder, base: Float32, delta: Float32 | None) -> float:
    """Compare a weight stored as integers with the reference's own, some rows at a time.

    Args:
        name: the weight's.
        found: how it is stored.
        base: the base's weight [out, in].
        delta: what the experts add to it [out, in]; None: nothing.

    Returns:
        The largest deviation as a fraction of its bound.

    Raises:
        ParityError: a number is not the nearest there is, or a scale does not fit its group.
    """
    rows, columns = base.shape
    unused = found.columns - columns
    if len(found) != rows or not 0 <= unused < (found.group if found.filled else 1):
        raise ParityError(
            f"the weight {name} in the engine has the shape {[len(found), found.columns]}",
            expected=str([rows, columns]),
            fix="this is a bug in the pass that quantises: report it",
        )
    branches = 0.0 if delta is None else 1e-5 * float(np.abs(delta).max())
    worst = 0.0
    height = max(1, _ELEMENTS // max(1, columns))
    for start in range(0, rows, height):
        part = slice(start, start + height)
        want = base[part].astype(np.float64)
        if delta is not None:
            want += delta[part]
        stored = found.rows(part, columns)
        error = np.abs(stored.numbers - want)
        beyond = np.abs(want - np.clip(want, stored.low, stored.high))
        bound = beyond + _HALF * stored.steps + branches
        ratio = error / np.maximum(bound, np.finfo(np.float64).tiny)
        largest = float(ratio.max())
        if not largest <= 1.0:  # NaN is not either
            row, column = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            raise ParityError(
                f"the weight {name} in the engine is off at {[start + int(row), int(column)]}: "
                f"it is stored as {stored.numbers[row, column]:.7g} in steps of "
                f"{stored.steps[row, column]:.3g}, base and experts give "
                f"{want[row, column]:.7g}, {largest:.3g} times the bound",
                expected="the nearest number there is",
                fix="this is a bug in the fold or in the pass that quantises: report it",
            )
        worst = max(worst, largest)
        if found.levels is not None:
            worst = max(worst, _check_range(name, start, found, want, error, branches))
    return worst


def _check_range(
    name: str, start: int, found: Decoder, want: Float64, error: Float64, branches: float
) -> float:
    """Return the largest error of a group of some rows as a fraction of its bound."""
    firsts = np.arange(0, want.shape[1], found.group)
    low = np.minimum(np.minimum.reduceat(want, firsts, axis=1), 0)
    high = np.maximum(np.maximum.reduceat(want, firsts, axis=1), 0)
    assert found.levels is not None
    span = high - low if found.fitted else 2 * np.maximum(high, -low)
    counts = np.diff([*firsts, want.shape[1]])
    rms = np.sqrt(np.add.reduceat(np.square(error), firsts, axis=1) / counts)
    bound = np.maximum(_HALF * span / found.levels + branches, np.finfo(np.float32).tiny)
    ratio = rms / bound
    largest = float(ratio.max())
    if not largest <= 1.0:
        row, group = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        raise ParityError(
            f"the weight {name} in the engine is too coarse at "
            f"{[start + int(row), int(firsts[group])]} and behind: its numbers there are off by "
            f"{rms[row, group]:.3g} in root mean square, {largest:.3g} times the bound",
            expected="a scale that fits them",
            fix="this is a bug in the pass that quantises: report it",
        )
    return largest
