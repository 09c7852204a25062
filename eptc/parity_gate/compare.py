"""Compare two arrays under a stated bound, and say where the worst element is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FP32", "Bound", "Comparison", "bound_of", "compare", "not_run"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """How far an element may be off: relative * max(floor, largest magnitude of the tensor).

    Args:
        relative: fraction of the tensor's largest magnitude.
        floor: magnitude below which the bound shrinks no further.
        why: where the numbers come from.
        cosine: smallest cosine of the angle between both tensors.
    """

    relative: float
    floor: float
    why: str
    cosine: float = -1.0

    @property
    def without_text(self) -> Bound:
        """The bound on tokens that are no text, of a lossy engine whose text is bounded.

        What it makes of them is no answer anybody will get; it may not be garbage.
        """
        return Bound(max(self.relative, 2.0), self.floor, "seeded tokens are no text")

    def absolute(self, sizes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the bound of elements that belong to tensors, or rows, of these magnitudes."""
        return self.relative * np.maximum(self.floor, np.asarray(sizes, np.float64))


FP32 = Bound(
    3e-5,
    1.0,
    "float32 on both sides: sums in another order move elements by up to 6e-6 of the largest "
    "over the tested models; a fault in the graph moves them by 1e-3 or more, and a fault in a "
    "weight is found by comparing the weights themselves",
)


_LOSSY = (
    "twice or more what the type loses on text over the tested models; a fault in the graph moves "
    "logits by as much as they are large"
)
_BY_PRECISION = {
    "fp16": Bound(0.01, 1.0, _LOSSY, 0.9995),
    "bf16": Bound(0.05, 1.0, _LOSSY, 0.995),
    "int8": Bound(0.5, 1.0, _LOSSY, 0.95),
    "int8-static": Bound(0.6, 1.0, _LOSSY, 0.95),
    "fp8": Bound(0.6, 1.0, _LOSSY, 0.95),
    # No wider than those of its 8 bits: beside them 16 bits lose nothing that shows.
    "int8-fp16": Bound(0.6, 1.0, _LOSSY, 0.95),
    "fp8-fp16": Bound(0.6, 1.0, _LOSSY, 0.95),
    "int8-weights": Bound(0.1, 1.0, _LOSSY, 0.995),
    "int4": Bound(0.75, 1.0, _LOSSY, 0.8),
    "mixed": Bound(0.75, 1.0, _LOSSY, 0.8),
}


def bound_of(precision: str) -> Bound:
    """Return the bound of the outputs of an engine of some precision."""
    return _BY_PRECISION.get(precision, FP32)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor against its reference.

    Args:
        what: which tensor, on which probe.
        shape: its shape.
        error: largest absolute difference; infinite where an element is NaN or infinite.
        bound: the largest difference that passes.
        worst: index of the worst element.
        got: its value.
        want: the reference's.
        cosine: of the angle between both, flattened.
        least_cosine: the smallest that passes.
        left_out: rows that were not compared, since the reference's own routes through them are
            within rounding of others.
        why: the reason of a bound that is not the report's; empty where it is.
    """

    what: str
    shape: tuple[int, ...]
    error: float
    bound: float
    worst: tuple[int, ...]
    got: float
    want: float
    cosine: float
    least_cosine: float = -1.0
    left_out: int = 0
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the worst element and the cosine are within the bound; a NaN never is."""
        turned = self.least_cosine > -1 and not self.cosine >= self.least_cosine
        return self.error <= self.bound and not turned

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; what is not finite becomes a string."""
        data = dataclasses.asdict(self) | {"passed": self.passed}
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in data.items()
        }

    def explain(self) -> str:
        """Say in one line how far off the worst element is and what would have passed."""
        if not self.worst and math.isnan(self.got):
            return self.what
        return (
            f"{self.what} {list(self.shape)}: element {list(self.worst)} is {self.got:.7g}, the "
            f"reference has {self.want:.7g}: off by {self.error:.3g}, allowed {self.bound:.3g} "
            f"(cosine {self.cosine:.6f}"
            + (f", at least {self.least_cosine:g})" if self.least_cosine > -1 else ")")
        )


def not_run(what: str) -> Comparison:
    """Return the failed comparison of what has no numbers to compare; `what` says why."""
    return Comparison(what, (), math.inf, 0.0, (), math.nan, math.nan, math.nan)


def compare(
    what: str,
    got: npt.NDArray[np.floating[Any]],
    want: npt.NDArray[np.floating[Any]],
    bound: Bound,
    where: npt.NDArray[np.bool_] | None = None,
    *,
    sizes: npt.NDArray[np.floating[Any]] | None = None,
) -> Comparison:
    """Compare two arrays of one shape.

    Args:
        what: name for the report.
        got: the engine's values.
        want: the reference's.
        bound: what is allowed.
        where: elements that count (broadcast over trailing axes); None: all. Padding does not.
        sizes: magnitudes that the elements' bounds go by (broadcast); the worst element is then
            the one furthest past its own. None: all go by the tensor's largest.
    """
    if got.shape != want.shape:
        failed = not_run(f"{what}: shape {list(got.shape)}, the reference has {list(want.shape)}")
        return dataclasses.replace(failed, shape=got.shape)
    if got.size == 0:
        return Comparison(what, got.shape, 0.0, 0.0, (), 0.0, 0.0, 1.0)
    a, b = got.astype(np.float64), want.astype(np.float64)
    if where is not None:
        mask = where.reshape(where.shape + (1,) * (a.ndim - where.ndim))
        a, b = np.where(mask, a, 0.0), np.where(mask, b, 0.0)
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    difference[~(np.isfinite(a) & np.isfinite(b))] = np.inf
    if sizes is None:
        sizes = np.abs(np.where(np.isfinite(b), b, 0.0)).max()
    allowed = np.broadcast_to(bound.absolute(sizes), b.shape)
    worst = np.unravel_index(int(np.argmax(difference / allowed)), difference.shape)
    return Comparison(
        what,
        got.shape,
        float(difference[worst]),
        float(allowed[worst]),
        tuple(int(i) for i in worst),
        float(a[worst]),
        float(b[worst]),
        _cosine(a, b),
        # Of an angle between single numbers only the sign is left.
        bound.cosine if a.shape[-1] > 1 else -1.0,
    )


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return the cosine of the angle between two tensors; of none with zero, NaN."""
    if not a.any() and not b.any():
        return 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float((a * b).sum() / norms) if math.isfinite(norms) and norms > 0 else math.nan
