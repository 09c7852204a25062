"""Results as an SVG, the same bytes for the same results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import CaseResult, Results, Timing

__all__ = ["draw"]

_COLOURS = {
    "engine": "#8a6bb1", "base": "#4c9f70", "exporter": "#d1803b", "pytorch": "#6b7fa3",
}  # fmt: skip
_TEXT = "#57606a"  # reads on light and dark pages
_COLUMNS = 2


def draw(results: Sequence[Results], path: Path) -> None:
    """Draw how many times faster the engine is than each contestant, a panel for each case.

    Args:
        results: with one measured case or more.
        path: the SVG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    cases = [result.case for result in results if result.case is not None]
    # Text stays text: its outlines would depend on the fonts that are installed. Ids depend on
    # the salt alone.
    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "eptc", "font.family": "sans-serif",
        "font.size": 8, "text.color": _TEXT, "axes.labelcolor": _TEXT, "axes.edgecolor": _TEXT,
        "xtick.color": _TEXT, "ytick.color": _TEXT,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        rows = math.ceil(len(cases) / _COLUMNS)
        figure = Figure(figsize=(9.6, 2.2 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
        for axes, case in zip(grid, cases, strict=False):
            _panel(axes, case)
        for axes in grid[len(cases) :]:
            axes.remove()
        figure.supxlabel(
            "times faster: the eptc engine, against each; bars are medians, lines paired "
            "95 % intervals",
            fontsize=8,
        )
        figure.savefig(path, transparent=True, metadata={"Date": None})


def _panel(axes: Any, case: CaseResult) -> None:
    shown = [timing for timing in case.timings if timing.ratio is not None]
    shown.sort(key=lambda timing: timing.ratio.estimate if timing.ratio else 0.0)
    for row, timing in enumerate(shown):
        _bar(axes, row, timing)
    axes.axvline(1.0, color=_TEXT, linewidth=0.8)
    # Twice as fast and twice as slow are as far from 1 as each other.
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_yticks(range(len(shown)), [timing.label for timing in shown])
    axes.invert_yaxis()
    axes.set_title(case.name, fontsize=9, loc="left")
    axes.margins(x=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _bar(axes: Any, row: int, timing: Timing) -> None:
    ratio = timing.ratio
    assert ratio is not None
    times = 1 / ratio.estimate
    axes.barh(row, times - 1, left=1, color=_COLOURS[timing.family], height=0.65)
    end = times
    if ratio.low is not None and ratio.high is not None:
        end = 1 / ratio.low
        axes.plot([1 / ratio.high, end], [row, row], color=_TEXT, linewidth=1.2)
    axes.annotate(
        f"{times:.2f}", (max(end, times, 1.0), row), xytext=(3, 0), textcoords="offset points",
        va="center", fontsize=7,
    )  # fmt: skip
