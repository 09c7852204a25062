"""A page's content as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import eptc
from eptc.page import charts, tables
from eptc.page.content import Content, Routes
from eptc.parity_lines import parity_lines
from eptc.runtime.manifest import Manifest
from eptc.units import readable_size

__all__ = ["render"]

# Bars of more layers than this could not be told apart.
_BARS = 240
_SIZES = {
    "adapter_bytes": "Bytes of adapters",
    "nodes": "Nodes of the graphs",
    "weight_bytes": "Bytes of weights",
}


def render(content: Content) -> str:
    """Return a page that stands for itself: styles, script and drawings are in it.

    Whatever comes from a checkpoint or a bundle is escaped.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eptc.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**_view(content))


def _view(content: Content) -> dict[str, Any]:
    manifest = content.manifest
    tasks = _tasks(manifest)
    counts = {
        state: sum(outcome.state == state for outcome in content.outcomes)
        for state in ("passed", "failed", "skipped")
    }
    found = content.parity
    return {
        "content": content,
        "title": ", ".join(tasks) or content.called,
        "counts": counts,
        "facts": _facts(content),
        "summary": list(parity_lines(found.summary())) if found and content.passed else [],
        "checks": tables.checks(content.outcomes),
        "tensors": tables.tensors(content) if found else None,
        "tensor_chart": _tensor_chart(content) if found else None,
        "layers": tables.layers(content) if content.layers else None,
        "layer_chart": _layer_chart(content) if content.layers else None,
        "passes": tables.passes(manifest.passes, content.seconds) if manifest else None,
        "pass_charts": _pass_charts(manifest.passes, content.seconds) if manifest else [],
        "routes": _routes(content.routes, tasks) if content.routes else None,
        "plan": tables.plan(content.plan) if content.plan else None,
        "levels": _levels(content.plan or {}),
        "files": tables.files(content) if manifest else None,
        "comparison": tables.comparison(content.comparison) if content.comparison else None,
        "comparison_charts": _comparison(content.comparison or {}),
        "version": eptc.__version__,
    }


def _tasks(manifest: Manifest | None) -> list[str]:
    """Return the names of the engine's tasks."""
    if manifest is None:
        return []
    return [task.name for task in manifest.tasks or filter(None, (manifest.task,))]


def _facts(content: Content) -> list[tuple[str, str]]:
    """Return what the bundle is, in short."""
    manifest = content.manifest
    if manifest is None:
        return []
    total = sum(record.size for record in manifest.files.values())
    facts = [
        ("tasks" if manifest.tasks else "task", ", ".join(_tasks(manifest)) or "none"),
        *(
            (f"labels of {task.name}" if manifest.tasks else "labels", ", ".join(task.labels))
            for task in manifest.tasks or filter(None, (manifest.task,))
        ),
        ("kind", manifest.kind),
        ("precision", manifest.precision),
        ("target", f"{manifest.target}, fused for {manifest.optimized_for}"),
        ("size", f"{readable_size(total)} in {len(manifest.files)} files"),
        ("routing", manifest.routing.meaning),
        (
            "checkpoint",
            f"{manifest.checkpoint['format']}, {manifest.checkpoint['sha256'][:16]}...",
        ),
        ("base", f"{manifest.base['model_type']}, {manifest.base['sha256'][:16]}..."),
        ("built with", ", ".join(f"{name} {v}" for name, v in manifest.tools.items())),
    ]
    return [(name, value) for name, value in facts if value]


def _tensor_chart(content: Content) -> charts.Chart:
    found = [
        (what, c.error / c.bound if c.bound else float("inf")) for what, c in content.compared
    ]
    return charts.errors("tensors-chart", "Error of each output over its bound", found)


def _layer_chart(content: Content) -> charts.Chart:
    """Draw the layers; of very many the worst of each group of neighbours."""
    every = [(layer.layer, layer.ratio) for layer in content.layers]
    group = -(-len(every) // _BARS)
    found = [
        max(every[start : start + group], key=lambda one: one[1])
        for start in range(0, len(every), group)
    ]
    said = "" if group == 1 else f"; a bar is the worst of {group} neighbours"
    return charts.errors("layers-chart", f"Error of each layer over its bound{said}", found)


def _pass_charts(
    records: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]
) -> list[charts.Chart]:
    """Draw sizes over the passes, adapters and graphs apart; of weights, where they change."""
    drawn = []
    for key, what in _SIZES.items():
        rows = [r for r in records if key in r["before"]]
        largest = max((max(r["before"][key], r["after"][key]) for r in rows), default=0)
        least = min((min(r["before"][key], r["after"][key]) for r in rows), default=0)
        if not largest or (key == "weight_bytes" and least > 0.99 * largest):
            continue
        bars = [
            (
                r["name"], r["before"][key] / largest, r["after"][key] / largest,
                _change(r, key, seconds.get(r["name"])),
            )
            for r in rows
        ]  # fmt: skip
        drawn.append(charts.bars(f"passes-{key}", f"{what}: before (outline), after", bars))
    return drawn


def _change(record: Mapping[str, Any], key: str, seconds: float | None) -> str:
    before, after = record["before"][key], record["after"][key]
    show = readable_size if key.endswith("bytes") else "{:,}".format
    said = show(after) if before == after else f"{show(before)} to {show(after)}"
    return said if seconds is None else f"{said}, {seconds * 1e3:.1f} ms"


def _routes(found: Routes, tasks: Sequence[str]) -> dict[str, Any]:
    """Return a map and a table for each task, the engine's own first."""
    order = sorted(range(len(found.tasks)), key=lambda number: found.tasks[number] not in tasks)
    looks = [tables.look(found, expert) for expert in range(found.experts)]
    scales = sorted(set(found.scales))
    if scales:
        legend = [(f"s{i % 8}", f"kernel {scale}x{scale}") for i, scale in enumerate(scales)]
    else:
        legend = [(look, f"expert {expert}") for expert, look in enumerate(looks)]
    maps = []
    for number in order:
        rows = []
        for path, each in found.linears.items():
            route = each[number]
            used = dict(zip(route["experts"], route["weights"], strict=True)) if route else {}
            rows.append((path, used))
        maps.append({
            "task": found.tasks[number],
            "own": found.tasks[number] in tasks,
            "static": any(each[number] for each in found.linears.values()),
            "chart": charts.map_of_routes(
                f"map-{number}", f"Experts of {found.tasks[number]}", found.experts, rows, looks,
                legend,
            ),
            "table": tables.routes(found, number),
        })  # fmt: skip
    return {"maps": maps, "linears": len(found.linears), "experts": found.experts}


def _levels(weights: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return how many weights there are of each level."""
    counts: dict[str, int] = {}
    for level in weights.values():
        counts[level] = counts.get(level, 0) + 1
    return sorted(counts.items())


def _comparison(found: Mapping[str, Any]) -> list[charts.Chart]:
    """Draw the score over size and over time, as far as they are known."""
    rows = [row for row in found.get("rows", []) if row.get("score") is not None]
    drawn = []
    sizes = [(r["precision"], r["bundle_bytes"] / 1e6, r["score"]) for r in rows]
    times = [
        (r["precision"], r["milliseconds"], r["score"]) for r in rows if r.get("milliseconds")
    ]
    for name, across, places in (("size", "bundle, MB", sizes), ("time", "ms a text", times)):
        if places:
            title = f"{found['metric']} over {across}"
            drawn.append(charts.points(f"by-{name}", title, across, found["metric"], places))
    return drawn
