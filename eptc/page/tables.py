"""Every number of a page, in tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from eptc.page.content import Content, Outcome, Routes
from eptc.units import readable_size

__all__ = [
    "Cell", "Table", "checks", "comparison", "files", "layers", "passes", "plan", "routes",
    "tensors",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what it says.
        sort: what it is sorted by, where that is a number.
        look: class of its colour.
    """

    text: str
    sort: float | None = None
    look: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Args:
        name: unique in its page.
        caption: what it lists.
        heads: of its columns.
        rows: cells, as many as heads.
        filtered: whether there are so many rows that one looks for some.
    """

    name: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def filtered(self) -> bool:
        """Whether there are so many rows that one looks for some."""
        return len(self.rows) > 8


def number(value: float | None, digits: int = 2) -> Cell:
    """Return a number as a cell; none is a dash."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:.{digits}g}", value if math.isfinite(value) else 1e308)


def _state(state: str) -> Cell:
    return Cell(state, look=f"is-{state}")


def checks(outcomes: Sequence[Outcome]) -> Table:
    """Return every check and what came of it."""
    rows = []
    for outcome in outcomes:
        said = outcome.why or ", ".join(
            f"{name.replace('_', ' ')} {_value(value)}" for name, value in outcome.found.items()
        )
        if outcome.error is not None:
            said = outcome.error.found
        rows.append([Cell(outcome.name), Cell(outcome.which), _state(outcome.state), Cell(said)])
    return Table("checks", "Every check", ["check", "of", "outcome", "what was found"], rows)


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:16]}..." if len(text) > 60 else text


def tensors(content: Content) -> Table:
    """Return every comparison of outputs."""
    rows = [
        [
            Cell(what), Cell("x".join(map(str, found.shape))), number(found.error),
            number(found.bound), number(found.error / found.bound if found.bound else math.inf),
            number(found.cosine, 6), _state("passed" if found.passed else "failed"),
        ]
        for what, found in content.compared
    ]  # fmt: skip
    heads = ["output", "shape", "largest error", "bound", "error / bound", "cosine", "outcome"]
    return Table("tensors", "Outputs beside the reference's", heads, rows)


def layers(content: Content) -> Table:
    """Return every layer's error."""
    rows = [
        [
            number(position, 6), Cell(layer.layer, look="path"), Cell(layer.graph),
            Cell("adapted" if layer.adapted else ""), number(layer.found.error),
            number(layer.found.bound), number(layer.ratio),
            _state("passed" if layer.found.passed else "failed"),
        ]
        for position, layer in enumerate(content.layers, 1)
    ]  # fmt: skip
    heads = [
        "#",
        "layer",
        "graph",
        "experts",
        "largest error",
        "bound",
        "error / bound",
        "outcome",
    ]
    return Table("layers", f"Layers on {content.probe}, in the order they run", heads, rows)


def passes(records: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> Table:
    """Return what each pass did."""
    rows = []
    for position, record in enumerate(records, 1):
        changed = ", ".join(
            f"{name.replace('_', ' ')} {before:,} to {record['after'][name]:,}"
            for name, before in record["before"].items()
            if record["after"].get(name) != before
        )
        changed = changed or ("changed" if record["changed"] else "nothing to do")
        taken = seconds.get(record["name"])
        rows.append([
            number(position, 6), Cell(record["name"]), Cell(record["contract"]),
            Cell(changed), number(record.get("error")),
            Cell("not recorded") if taken is None else Cell(f"{taken * 1e3:.1f} ms", taken),
        ])  # fmt: skip
    heads = ["#", "pass", "contract", "what changed", "error / bound", "time"]
    return Table("passes", "Passes in the order they ran", heads, rows)


def routes(found: Routes, task: int) -> Table:
    """Return the weights of one task's experts in every linear."""
    heads = ["linear"]
    for expert in range(found.experts):
        scale = f" ({found.scales[expert]})" if expert < len(found.scales) else ""
        heads.append(f"expert {expert}{scale}")
    rows = []
    for path, each in found.linears.items():
        route = each[task]
        if route is None:
            cells = [Cell("by input")] * found.experts
            rows.append([Cell(path, look="path"), *cells, Cell("-")])
            continue
        used = dict(zip(route["experts"], route["weights"], strict=True))
        cells = [
            Cell(f"{used[e]:.3f}", used[e], f"used {look(found, e)}") if e in used else Cell("")
            for e in range(found.experts)
        ]
        rows.append([Cell(path, look="path"), *cells, number(route["margin"])])
    name = f"routes-{task}"
    return Table(
        name, f"Weights of the experts of task {found.tasks[task]}", [*heads, "margin"], rows
    )


def look(found: Routes, expert: int) -> str:
    """Return the class of the colour of an expert: that of its scale, else of the expert."""
    if expert < len(found.scales):
        return f"s{sorted(set(found.scales)).index(found.scales[expert]) % 8}"
    return f"s{expert % 8}"


def plan(weights: Mapping[str, str]) -> Table:
    """Return what each weight is stored as."""
    rows = [[Cell(name, look="path"), Cell(level)] for name, level in weights.items()]
    return Table("plan", "What each weight is stored as", ["weight", "stored as"], rows)


def files(content: Content) -> Table:
    """Return the bundle's files."""
    assert content.manifest is not None
    rows = [
        [
            Cell(name),
            Cell(readable_size(record.size), record.size),
            Cell(record.sha256, look="hash"),
        ]
        for name, record in content.manifest.files.items()
    ]  # fmt: skip
    return Table("files", "Files of the bundle", ["file", "size", "SHA-256"], rows)


def comparison(found: Mapping[str, Any]) -> Table:
    """Return the precisions that were built beside this one."""
    rows = []
    for row in found["rows"]:
        if row.get("refused"):
            continue
        rows.append([
            Cell(row["precision"]), Cell(readable_size(row["bundle_bytes"]), row["bundle_bytes"]),
            number(row.get("milliseconds"), 4), number(row.get("score"), 4),
            number(row.get("drop"), 3), number(row.get("flips"), 6),
        ])  # fmt: skip
    heads = ["precision", "bundle", "ms a text", found["metric"], "points lost", "labels changed"]
    return Table("comparison", f"Precisions on {found['examples']} rows", heads, rows)
