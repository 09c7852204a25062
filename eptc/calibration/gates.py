"""The gates of an engine's routers on real text: their mean, and how far they spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eptc.calibration.rows import play, read_rows
from eptc.calibration.taps import Moments
from eptc.examples_file import Example
from eptc.ir import Float64
from eptc.runtime import Engine
from eptc.runtime.loading import open_tokenizer

__all__ = ["GateStatistics", "observe_gates"]


@dataclasses.dataclass(frozen=True)
class GateStatistics:
    """What the gates of one linear were.

    Args:
        mean: [experts].
        spread: standard deviation [experts].
        count: how many routes were seen: of tokens, rows or batches.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    count: int


def observe_gates(
    bundle: Path, examples: Sequence[Example], gates: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, GateStatistics]:
    """Run an engine on text, one example at a time, and return what its gates were.

    Every route counts the same: each token, with or without a cache, or each row.

    Args:
        bundle: folder of an engine that computes in float32.
        examples: with the task's fields and, maybe, `label`; too long ones are cut as training
            did.
        gates: by graph, then by the path of the linear, the values that hold its gates
            [..., experts].

    Raises:
        BundleError: the bundle cannot be loaded.
        InputError: an example that is not such a text.
    """
    with Engine.load(bundle, providers=["cpu"]) as engine:
        manifest = engine.manifest
        rows = list(read_rows(engine, open_tokenizer(bundle, manifest), examples))
    taps = {
        graph: Moments(
            bundle, spec.file, sorted({v for values in gates[graph].values() for v in values})
        )
        for graph, spec in manifest.graphs.items()
    }
    for row in rows:
        play(manifest, row, lambda graph, feeds: taps[graph].run(feeds))
    found: dict[str, list[Float64]] = {}
    for graph, tap in taps.items():
        moments = dict(zip(tap.values, tap.moments, strict=True))
        for path, values in gates[graph].items():
            found.setdefault(path, []).extend(moments[v] for v in values if moments[v].size)
    return {path: _statistics(np.sum(parts, axis=0)) for path, parts in sorted(found.items())}


def _statistics(moments: Float64) -> GateStatistics:
    """Return statistics from the sums [3, experts] of 1, g and g^2."""
    count, total, squares = moments
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return GateStatistics(_rounded(mean), _rounded(spread), int(count[0]))


def _rounded(values: Float64) -> tuple[float, ...]:
    # What is beyond depends on the processor's sums.
    return tuple(round(float(value), 6) for value in values)
