"""Where to cut a value's range so that few numbers are cut and the others are told apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eptc.runtime.graph import NumpyArray

__all__ = ["BINS", "Histogram", "entropy_bins", "percentile_bins"]

Counts = npt.NDArray[np.int64]

# Bins on each side of the one around zero. Percentiles need fine ones; divergences have a
# candidate for each.
BINS = {"percentile": 2048, "entropy": 512}
# Share of the numbers that a percentile covers.
_COVERED = 0.99999
# Levels of 8 bits on either side of zero.
_LEVELS = 128
# Added to empty bins before two distributions are compared.
_SMOOTH = 1e-4
# Numbers counted at once.
_PIECE = 2**20


class Histogram:
    """Counts numbers from -largest to largest, in bins of equal width around zero.

    Args:
        largest: the largest magnitude; above 0.
        side: bins on each side of the one around zero.
    """

    def __init__(self, largest: float, side: int) -> None:
        self.counts: Counts = np.zeros(2 * side + 1, np.int64)
        self._largest = largest
        self._side = side

    def add(self, numbers: NumpyArray) -> None:
        """Count some numbers, any shape."""
        flat = numbers.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            # In float64: a mask's bins are wider than float32 reaches.
            piece = flat[start : start + _PIECE].astype(np.float64)
            ends = (-self._largest, self._largest)
            self.counts += np.histogram(piece, bins=self.counts.size, range=ends)[0]

    def edge(self, bins: int) -> float:
        """Return the upper end of so many bins above the one around zero."""
        return self._largest * (2 * bins + 1) / (2 * self._side + 1)


def percentile_bins(counts: Counts) -> int:
    """Return the fewest bins on each side of zero's that cover 99.999 % of the numbers."""
    side = counts.size // 2
    covered = counts[side:].copy()
    covered[1:] += counts[side - 1 :: -1]
    return int(np.searchsorted(covered.cumsum(), _COVERED * counts.sum()))


def entropy_bins(counts: Counts) -> int:
    """Return how many bins on each side of zero's an 8-bit range should cover.

    The range whose numbers, put into 128 levels, tell least less about themselves than before:
    the smallest Kullback-Leibler divergence, what is cut counted as the range's ends
    (Migacz, 8-bit inference with TensorRT, 2017). As onnxruntime.quantization computes it.
    """
    side = counts.size // 2
    first = _LEVELS // 2
    divergences = [_divergence(counts, bins) for bins in range(first, side + 1)]
    return first + int(np.argmin(divergences))


def _divergence(counts: Counts, bins: int) -> float:
    """Return how much less 128 levels tell than the bins from -bins to bins."""
    side = counts.size // 2
    inside = counts[side - bins : side + bins + 1]
    reference = inside.copy()
    reference[0] += counts[: side - bins].sum()
    reference[-1] += counts[side + bins + 1 :].sum()
    width = inside.size // _LEVELS
    split = inside[: _LEVELS * width].reshape(_LEVELS, width)
    levels = split.sum(axis=1)
    levels[-1] += inside[_LEVELS * width :].sum()
    filled = (reference[: _LEVELS * width].reshape(_LEVELS, width) != 0).sum(axis=1)
    # Each level is spread over its bins that had numbers; whole numbers, as it is defined.
    shares = levels // np.maximum(filled, 1) * (filled > 0)
    spread = np.zeros_like(inside)
    spread[: _LEVELS * width] = np.repeat(shares, width)
    p, q = _smoothed(reference), _smoothed(spread)
    if p is None or q is None:
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def _smoothed(counts: Counts) -> npt.NDArray[np.float32] | None:
    """Return counts of which none is 0; None where too few are not."""
    empty = counts == 0
    zeros, others = int(empty.sum()), int(counts.size - empty.sum())
    if others == 0 or _SMOOTH * zeros >= others:
        return None
    taken = np.float32(-_SMOOTH * zeros / others)
    return counts.astype(np.float32) + np.where(empty, np.float32(_SMOOTH), taken)
