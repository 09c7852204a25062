"""How far the values of an engine reach on real text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from eptc.calibration.histograms import BINS, Histogram, entropy_bins, percentile_bins
from eptc.calibration.rows import Row, play, read_rows
from eptc.calibration.store import key, load, store
from eptc.calibration.taps import Extremes, Tap, Values
from eptc.errors import InputError
from eptc.examples_file import Example
from eptc.lower.element_types import element_types
from eptc.runtime import Engine, Manifest, load_manifest
from eptc.runtime.graph import NumpyArray
from eptc.runtime.loading import open_tokenizer

__all__ = [
    "MAX_BYTES",
    "Method",
    "Range",
    "float_values",
    "least_magnitudes",
    "observe",
    "weight_ranges",
]

Array = npt.NDArray[Any]
T = TypeVar("T")
Method = Literal["minmax", "entropy", "percentile"]

# Bytes of values that are held at once.
MAX_BYTES = 256 * 2**20
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Range:
    """The smallest and the largest number of a value."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The largest distance from zero."""
        return max(abs(self.low), abs(self.high))


def float_values(model: ir.Model) -> list[str]:
    """Return the names of all float32 inputs and results of a graph, in its order."""
    types = element_types(model)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return [str(value.name) for value in values if types.get(value) == ir.DataType.FLOAT]


def weight_ranges(
    bundle: Path, weights: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Range]]:
    """Return how far weights of an engine reach, by graph; one is in memory at a time.

    Args:
        bundle: folder of the engine.
        weights: names by graph.
    """
    return _each(
        bundle, weights, lambda _graph, _name, w: Range(float(np.min(w)), float(np.max(w)))
    )


def least_magnitudes(
    bundle: Path, weights: Mapping[str, Mapping[str, int | None]]
) -> dict[str, dict[str, float]]:
    """Return the magnitude of the smallest channel of weights, by graph; one is read at a time.

    The magnitude of a channel is that of its largest number; channels of zeros have none. Of a
    weight of zeros it is infinite.

    Args:
        bundle: folder of the engine.
        weights: by graph and name, the axis of the channels; None: the weight is one channel.
    """

    def least(graph: str, name: str, weight: Array) -> float:
        others = tuple(n for n in range(weight.ndim) if n != weights[graph][name])
        channels = np.maximum(weight.max(axis=others), -weight.min(axis=others))
        return float(np.min(channels, initial=np.inf, where=channels > 0))

    return _each(bundle, weights, least)


def _each(
    bundle: Path, weights: Mapping[str, Collection[str]], compute: Callable[[str, str, Array], T]
) -> dict[str, dict[str, T]]:
    """Return what a function of graph, name and numbers makes of each weight."""
    found: dict[str, dict[str, T]] = {}
    for graph, spec in load_manifest(bundle).graphs.items():
        stored = ir.load(bundle / spec.file).graph.initializers
        found[graph] = {}
        for name in weights[graph]:
            tensor = stored[name].const_value
            assert tensor is not None
            # No view of the file may be left when it is closed.
            found[graph][name] = compute(graph, name, tensor.numpy())
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
    return found


def observe(
    bundle: Path,
    examples: Sequence[Example],
    values: Mapping[str, Sequence[str]],
    *,
    method: Method = "minmax",
    max_bytes: int = MAX_BYTES,
) -> Mapping[str, Mapping[str, Range]]:
    """Run an engine on text, one example at a time, and return how far its values reach.

    Every graph runs: a classifier once, an encoder-decoder and a decoder with the tokens that the
    engine itself writes and those of labels. What was observed before is read from the cache.

    * `minmax`: from the smallest number to the largest.
    * `percentile`: no further from zero than 99.999 % of the numbers.
    * `entropy`: no further from zero than 8 bits tell most about the numbers.

    Args:
        bundle: folder of an engine that computes in float32.
        examples: with the task's fields and, maybe, `label`; too long ones are cut as training
            did.
        values: float32 values by graph; `float_values` returns all.
        method: where a range ends.
        max_bytes: numbers that may leave the graphs at once; a value that is larger is there
            alone. For `minmax` none do.

    Returns:
        The range of each value by graph; a value that was always empty has none.

    Raises:
        BundleError: the bundle cannot be loaded.
        InputError: an example that is not such a text, or on which a value is not finite.
    """
    folder = Path(bundle)
    with Engine.load(folder, providers=["cpu"]) as engine:
        manifest = engine.manifest
        name = key(manifest, examples, values, method)
        ends = load(name)
        if ends is None:
            rows = list(read_rows(engine, open_tokenizer(folder, manifest), examples))
    if ends is None:  # by now the engine's own sessions are closed
        ends = _Run(folder, manifest, rows, values).ends(method, max_bytes)
        store(name, ends)
    return {
        graph: {value: Range(*pair) for value, pair in found.items()}
        for graph, found in ends.items()
    }


class _Run:
    """Runs over all examples.

    Args:
        folder: the bundle.
        manifest: its manifest.
        rows: the examples.
        values: what is observed, by graph.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        rows: Sequence[Row],
        values: Mapping[str, Sequence[str]],
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._rows = rows
        self._values = {graph: list(values.get(graph, ())) for graph in manifest.graphs}

    def ends(self, method: Method, max_bytes: int) -> dict[str, dict[str, tuple[float, float]]]:
        taps = {
            graph: Extremes(self._folder, self._manifest.graphs[graph].file, values)
            for graph, values in self._values.items()
        }
        self._play(taps)
        ends = {
            graph: {
                value: (float(low), float(high))
                for value, low, high in zip(tap.values, tap.low, tap.high, strict=True)
                if low <= high
            }
            for graph, tap in taps.items()
        }
        if method == "minmax":
            return ends
        sizes = {
            graph: dict(zip(tap.values, tap.sizes.tolist(), strict=True))
            for graph, tap in taps.items()
        }
        del taps
        cuts = self._cuts(ends, sizes, method, max_bytes)
        return {
            graph: {value: _cut(pair, cuts[graph, value]) for value, pair in found.items()}
            for graph, found in ends.items()
        }

    def _play(self, taps: Mapping[str, Tap]) -> None:
        """Run every example through the tapped graphs."""
        for number, row in enumerate(self._rows):
            at = ""

            def run(graph: str, feeds: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
                nonlocal at
                at = graph
                return taps[graph].run(feeds)

            try:
                play(self._manifest, row, run)
            except FloatingPointError as error:
                raise InputError(
                    f"on example {number} the value {error.args[0]!r} of the graph {at!r} is not "
                    "finite",
                    expected="numbers, as the engine's float32 should give",
                    fix="find out what is odd about that example, or leave it out",
                ) from error

    def _cuts(
        self,
        ends: Mapping[str, Mapping[str, tuple[float, float]]],
        sizes: Mapping[str, Mapping[str, int]],
        method: Method,
        max_bytes: int,
    ) -> dict[tuple[str, str], float]:
        """Return how far from zero each value's range should reach."""
        cuts = {(graph, value): 0.0 for graph, found in ends.items() for value in found}
        groups = {
            graph: _groups({value: sizes[graph][value] for value in found}, max_bytes)
            for graph, found in ends.items()
        }
        choose = entropy_bins if method == "entropy" else percentile_bins
        for turn in range(max(map(len, groups.values()), default=0)):
            taps = {}
            for graph, found in groups.items():
                histograms = {
                    value: Histogram(largest, BINS[method])
                    for value in (found[turn] if turn < len(found) else [])
                    if (largest := Range(*ends[graph][value]).magnitude) > 0
                }
                file = self._manifest.graphs[graph].file
                taps[graph] = Values(self._folder, file, histograms)
            self._play(taps)
            for graph, tap in taps.items():
                for value, histogram in tap.histograms.items():
                    cuts[graph, value] = histogram.edge(choose(histogram.counts))
        return cuts


def _cut(ends: tuple[float, float], at: float) -> tuple[float, float]:
    """Return a range that ends at a distance from zero, but never before it begins."""
    low, high = ends
    return min(max(low, -at), high), max(min(high, at), low)


def _groups(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return values in groups of at most so many bytes; a larger one alone."""
    groups: list[list[str]] = []
    held = max_bytes + 1
    for value, size in sizes.items():
        held += size * _FLOAT32
        if held > max_bytes:
            groups.append([])
            held = size * _FLOAT32
        groups[-1].append(value)
    return groups
