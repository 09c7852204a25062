"""Charts as lists of shapes, for inline SVG; every number in them is in a table as well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Chart", "Shape", "bars", "errors", "map_of_routes", "points"]

_WIDTH = 960.0
_TEXT = 12.0
# Decades below the bound that are shown; what is further below is as good as zero.
_DECADES = 6


@dataclasses.dataclass(frozen=True)
class Shape:
    """One element of a drawing.

    Args:
        kind: `rect`, `line`, `circle` or `text`.
        attributes: of the element.
        text: content of a text.
        title: what is shown when it is pointed at.
    """

    kind: str
    attributes: Mapping[str, Any]
    text: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing.

    Args:
        name: unique in its page.
        title: what it is.
        description: what it shows, for those who do not see it.
        width: of its coordinates.
        height: likewise.
        shapes: back to front.
        legend: class and meaning of colours.
    """

    name: str
    title: str
    description: str
    width: float
    height: float
    shapes: Sequence[Shape]
    legend: Sequence[tuple[str, str]] = ()


def _rect(
    x: float, y: float, width: float, height: float, look: str, title: str = "", **more: Any
) -> Shape:
    box = {"x": _n(x), "y": _n(y), "width": _n(max(width, 0.5)), "height": _n(max(height, 0.5))}
    return Shape("rect", {**box, "class": look, **more}, title=title)


def _text(x: float, y: float, text: str, anchor: str = "start") -> Shape:
    return Shape("text", {"x": _n(x), "y": _n(y), "text-anchor": anchor}, text)


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> Shape:
    return Shape("line", {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": look})


def _n(value: float) -> float:
    return round(value, 2)


def errors(name: str, title: str, found: Sequence[tuple[str, float]]) -> Chart:
    """Draw errors as parts of their bounds on a logarithmic scale; above the line is too much.

    Args:
        name: of the chart.
        title: what it is.
        found: what was compared, in order, and its error over its bound.
    """
    left, top, height = 56.0, 14.0, 200.0
    largest = max((r for _, r in found if math.isfinite(r)), default=1.0)
    above = max(1, math.ceil(math.log10(max(largest, 1.0)) + 0.2))
    scale = height / (above + _DECADES)

    def place(ratio: float) -> float:
        power = above if not math.isfinite(ratio) else math.log10(max(ratio, 10.0**-_DECADES))
        return top + (above - power) * scale

    shapes = []
    for power in range(above, -_DECADES - 1, -max(1, (above + _DECADES) // 7)):
        y = place(10.0**power)
        shapes.append(_line(left, y, _WIDTH, y, "grid"))
        if power:
            shapes.append(_text(left - 6, y + 4, f"1e{power}", "end"))
    step = (_WIDTH - left) / max(1, len(found))
    base = top + height
    for number, (what, ratio) in enumerate(found):
        y, off = place(ratio), not ratio <= 1
        x = left + (number + 0.15) * step
        said = f"{what}: {ratio:.2g} of its bound" + (" - OFF" if off else "")
        shapes.append(
            _rect(x, y, step * 0.7, base - y, "bad" if off else "ok", said, **{"data-key": what})
        )
    shapes += [_line(left, place(1.0), _WIDTH, place(1.0), "bound"),
               _text(left - 6, place(1.0) + 4, "bound", "end")]  # fmt: skip
    above_it = [what for what, ratio in found if not ratio <= 1]
    description = (
        f"{len(found)} bars; {len(above_it)} are above their bound"
        + (f", the first is {above_it[0]}" if above_it else "")
        + f"; the largest is {largest:.2g} of its bound."
    )
    legend = (
        [("ok", "within its bound"), ("bad", "off")] if above_it else [("ok", "within its bound")]
    )
    return Chart(name, title, description, _WIDTH, base + 8, shapes, legend)


def bars(name: str, title: str, rows: Sequence[tuple[str, float, float, str]]) -> Chart:
    """Draw what sizes were before (outline) and after (filled) each step.

    Args:
        name: of the chart.
        title: what it is.
        rows: the step, the size before and after as parts of the largest, and what to write.
    """
    left, row, right = 190.0, 24.0, 250.0
    length = _WIDTH - left - right
    shapes = []
    for number, (step, before, after, said) in enumerate(rows):
        y = number * row + 6
        shapes += [
            _text(left - 8, y + _TEXT, step, "end"),
            _rect(left, y, before * length, row - 8, "ghost"),
            _rect(left, y, after * length, row - 8, "ok", f"{step}: {said}"),
            _text(left + max(before, after) * length + 8, y + _TEXT, said),
        ]
    description = "; ".join(f"{step}: {said}" for step, _, _, said in rows)
    return Chart(name, title, description, _WIDTH, len(rows) * row + 8, shapes)


def map_of_routes(
    name: str,
    title: str,
    experts: int,
    rows: Sequence[tuple[str, Mapping[int, float]]],
    looks: Sequence[str],
    legend: Sequence[tuple[str, str]],
) -> Chart:
    """Draw which experts each linear uses: a column a linear, a row an expert.

    Args:
        name: of the chart.
        title: what it is.
        experts: how many there are.
        rows: each linear, and the weight of each expert that it uses.
        looks: class of each expert's colour.
        legend: class and meaning of colours.
    """
    left, cell = 72.0, 18.0
    step = (_WIDTH - left) / max(1, len(rows))
    shapes = [_text(left - 8, e * cell + 14, f"expert {e}", "end") for e in range(experts)]
    for number, (linear, used) in enumerate(rows):
        for expert in range(experts):
            x, y, weight = left + number * step, expert * cell + 2, used.get(expert)
            if weight is None:
                shapes.append(_rect(x, y, step * 0.94, cell - 2, "none"))
                continue
            shown = {"fill-opacity": _n(0.35 + 0.65 * min(1.0, abs(weight)))}
            said = f"{linear}, expert {expert}: {weight:.3f}"
            shapes.append(_rect(x, y, step * 0.94, cell - 2, looks[expert], said, **shown))
    description = (
        f"{len(rows)} linears of {experts} experts; filled where the task uses an expert, "
        "stronger where its weight is larger. The tables below have every weight."
    )
    return Chart(name, title, description, _WIDTH, experts * cell + 8, shapes, legend)


def points(
    name: str, title: str, across: str, up: str, found: Sequence[tuple[str, float, float]]
) -> Chart:
    """Draw points with their names: further up and left is better.

    Args:
        name: of the chart.
        title: what it is.
        across: what the horizontal axis is.
        up: what the vertical one is.
        found: a name, and where it lies on both.
    """
    width, left, top, height, bottom = 470.0, 60.0, 12.0, 220.0, 40.0
    right = max(x for _, x, _ in found) * 1.25 or 1.0
    low, high = min(y for *_, y in found), max(y for *_, y in found)
    spread = max(high - low, 1e-3)
    low, high = low - 0.15 * spread, high + 0.15 * spread

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + x / right * (width - left),
            top + (high - y) / (high - low) * (height - top),
        )

    shapes = [_line(left, height, width, height, "axis"), _line(left, top, left, height, "axis")]
    for part in range(5):
        x, y = right * part / 5, low + (high - low) * part / 4
        shapes += [
            _text(place(x, low)[0], height + 16, f"{x:.3g}", "middle"),
            _text(left - 6, place(0, y)[1] + 4, f"{y:.3f}", "end"),
        ]
    shapes.append(_text((left + width) / 2, height + 34, across, "middle"))
    taken: list[tuple[float, float]] = []
    for what, x, y in sorted(found, key=lambda one: one[1]):
        at = place(x, y)
        # Names of points beside one another would lie on one another.
        shift = sum(
            1 for other in taken if abs(other[0] - at[0]) < 80 and abs(other[1] - at[1]) < 12
        )
        taken.append(at)
        said = f"{what}: {across} {x:.3g}, {up} {y:.4f}"
        dot = {"cx": _n(at[0]), "cy": _n(at[1]), "r": 5, "class": "ok"}
        shapes += [
            Shape("circle", dot, title=said),
            _text(at[0] + 8, at[1] - 6 - 14 * shift, what),
        ]
    description = "; ".join(f"{what}: {x:.3g}, {y:.4f}" for what, x, y in found)
    return Chart(
        name, title, f"{up} over {across}. {description}.", width, height + bottom, shapes
    )
