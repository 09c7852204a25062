"""What a comparison of precisions came to, as JSON, as a table and as a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import bundle
from eptc.parity_gate.answers import CLAIMED
from eptc.precision import Precision
from eptc.runtime.cpus import usable_cpus

__all__ = ["Comparison", "Row", "draw", "notes", "table", "write"]

# As a part of an axis, points this near to one another have one label.
_NEAR = 0.06
_COLOUR = "#57606a"  # reads on light and dark pages


@dataclasses.dataclass(frozen=True)
class Row:
    """One precision.

    Args:
        precision: its name.
        refused: why there is no such engine; None where there is one.
        bundle_bytes: size of the bundle.
        weight_bytes: of its `weights.bin`.
        milliseconds: median time of a text alone; of a simulated precision, None: this machine
            would compute it in float32.
        time_of_fp32: median ratio of that time to float32's, both asked in turn.
        score: of the task's metric on the data.
        drop: points lost against float32, with its paired 95 % interval.
        drop_interval: see `drop`.
        flips: labels that are others than float32's.
        flips_beyond_noise: of those, where float32 is sure.
        cosine: of the scores of all labels.
        note: what to know of these figures; None: nothing.
    """

    precision: Precision
    refused: str | None = None
    bundle_bytes: int | None = None
    weight_bytes: int | None = None
    milliseconds: float | None = None
    time_of_fp32: float | None = None
    score: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    flips: int | None = None
    flips_beyond_noise: int | None = None
    cosine: float | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `--precision all` made.

    Args:
        path: its folder: a bundle for each precision, `comparison.json`, `.md` and `.svg`.
        metric: the task's.
        examples: rows it was measured on.
        rows: every precision, also those there is no engine of.
    """

    path: Path
    metric: str
    examples: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def write(folder: Path, comparison: Comparison) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.svg`."""
    bundle.write_json(folder / "comparison.json", comparison.to_json())
    (folder / "comparison.md").write_text(_markdown(comparison), "utf-8")
    draw(comparison, folder / "comparison.svg")


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the comparison's columns, and the cells of each engine's row."""
    exact = next(row for row in comparison.rows if row.precision == "fp32")
    heads = [
        "precision", "bundle MB", "of fp32", "ms a text", "of fp32", comparison.metric,
        "points lost", "95 % interval", "flips", "where sure", "cosine",
    ]  # fmt: skip
    cells = []
    for row in comparison.rows:
        if row.refused is not None:
            continue
        assert row.bundle_bytes and exact.bundle_bytes  # noqa: PT018
        assert row.drop is not None
        assert row.drop_interval is not None
        cells.append([
            row.precision, f"{row.bundle_bytes / 1e6:.1f}",
            f"{row.bundle_bytes / exact.bundle_bytes:.3f}",
            "-" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            "-" if row.time_of_fp32 is None else f"{row.time_of_fp32:.2f}",
            f"{row.score:.4f}", f"{row.drop + 0.0:.2f}",
            f"{row.drop_interval[0]:.2f} to {row.drop_interval[1]:.2f}", str(row.flips),
            str(row.flips_beyond_noise), f"{row.cosine:.6f}",
        ])  # fmt: skip
    return heads, cells


def notes(comparison: Comparison) -> list[str]:
    """Return what there is to say beside the table, such as why there is no engine of a row."""
    refused = [f"No {row.precision}: {row.refused}" for row in comparison.rows if row.refused]
    return refused + [f"{row.precision}: {row.note}" for row in comparison.rows if row.note]


def _markdown(comparison: Comparison) -> str:
    heads, cells = table(comparison)
    lines = [heads, ["---"] * len(heads), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text += "".join(f"\n\n{note}." for note in notes(comparison))
    return (
        f"# Precisions\n\n{comparison.examples} labelled rows; a text at a time on "
        f"{usable_cpus()} CPUs; what has 16 bits is simulated, and has no latency here. A "
        f"loss of less than its interval says nothing, and fewer than {CLAIMED} rows speak for "
        f"themselves alone.\n\n{text}\n"
    )


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the score over the size and over the latency: up and left is better."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [row for row in comparison.rows if row.refused is None]
    # Text stays text: its outlines would depend on the fonts that are installed.
    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "eptc", "font.family": "sans-serif",
        "font.size": 9, "text.color": _COLOUR, "axes.labelcolor": _COLOUR,
        "axes.edgecolor": _COLOUR, "xtick.color": _COLOUR, "ytick.color": _COLOUR,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set(xlabel="bundle, MB", ylabel=comparison.metric)
        right.set(xlabel="ms a text")
        sizes = {row.precision: (row.bundle_bytes or 0) / 1e6 for row in shown}
        times = {row.precision: row.milliseconds for row in shown if row.milliseconds is not None}
        _points(left, sizes, shown)
        _points(right, times, shown)
        for axes in (left, right):
            axes.set_xlim(left=0)
            axes.margins(0.15)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def _points(axes: Any, places: Mapping[Precision, float], rows: Sequence[Row]) -> None:
    """Draw a point for each precision; those that lie on one another share their label."""
    near = _NEAR * max(places.values())
    labels: dict[tuple[float, float | None], list[str]] = {}
    for row in sorted(rows, key=lambda row: places.get(row.precision, 0.0)):
        if row.precision not in places:
            continue
        x = places[row.precision]
        axes.plot([x], [row.score], "o", color="#4c9f70" if row.precision == "fp32" else "#d1803b")
        beside = [key for key in labels if key[1] == row.score and x - key[0] < near]
        labels.setdefault(beside[0] if beside else (x, row.score), []).append(row.precision)
    for place, names in labels.items():
        axes.annotate(
            ", ".join(names), place, xytext=(5, 4), textcoords="offset points", fontsize=8
        )
