"""Where ranges are cut: against onnxruntime.quantization on the same numbers."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from eptc.calibration.histograms import BINS, Histogram, entropy_bins, percentile_bins

NUMBERS = {
    "normal": lambda rng: rng.normal(size=40_000),
    "heavy tails": lambda rng: rng.standard_t(2, size=40_000),
    "not negative": lambda rng: np.maximum(rng.normal(size=40_000), 0),
    "one outlier": lambda rng: np.append(rng.normal(size=40_000), 300.0),
    "few": lambda rng: rng.normal(size=700),
}


def histogram(numbers: Any, method: str) -> Histogram:
    found = Histogram(float(np.abs(numbers).max()), BINS[method])
    for part in np.array_split(numbers, 7):
        found.add(part)
    assert found.counts.sum() == numbers.size
    return found


def collector(method: str, symmetric: bool) -> Any:
    from onnxruntime.quantization.calibrate import HistogramCollector

    return HistogramCollector(
        method=method, symmetric=symmetric, num_bins=2048, num_quantized_bins=128,
        percentile=99.999, scenario="same",
    )  # fmt: skip


@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_percentile(make: Any) -> None:
    """Within two bins of what it finds with bins half as wide."""
    numbers = make(np.random.default_rng(0)).astype(np.float32)
    found = histogram(numbers, "percentile")
    cut = found.edge(percentile_bins(found.counts))
    other = collector("percentile", symmetric=True)
    with contextlib.redirect_stdout(io.StringIO()):
        other.collect({"x": numbers})
        want = other.compute_collection_result()["x"]
    width = 2 * float(np.abs(numbers).max()) / found.counts.size
    reach = min(cut, float(numbers.max()))
    assert reach == pytest.approx(float(want[1]), abs=2 * width)
    assert (np.abs(numbers) <= cut).mean() >= 0.99999


@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_entropy(make: Any) -> None:
    """The very threshold it finds on the same histogram."""
    numbers = make(np.random.default_rng(0)).astype(np.float32)
    largest = float(np.abs(numbers).max())
    found = Histogram(largest, 96)
    found.add(numbers)
    edges = np.linspace(-largest, largest, found.counts.size + 1).astype(np.float32)
    ends = (np.float32(-largest), np.float32(largest))
    other = collector("entropy", symmetric=False)
    want = other.get_entropy_threshold((found.counts, edges, *ends), 128)
    assert found.edge(entropy_bins(found.counts)) == pytest.approx(float(want[1]), rel=1e-5)


def test_mask() -> None:
    """The lowest float32 has its bin, and nothing overflows."""
    lowest = float(np.finfo(np.float32).min)
    found = Histogram(-lowest, BINS["entropy"])
    found.add(np.array([0.0, lowest, -1.0], np.float32))
    assert found.counts[0] == 1
    assert found.counts[BINS["entropy"]] == 2


def test_edges() -> None:
    found = Histogram(9.0, 4)
    assert [found.edge(bins) for bins in range(5)] == [1.0, 3.0, 5.0, 7.0, 9.0]
