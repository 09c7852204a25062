"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from eptc.parity_lines import parity_lines, thrown_away
from eptc.runtime.pack_spec import PackTask

if TYPE_CHECKING:
    from eptc.builds import Report
    from eptc.comparison_report import Comparison
    from eptc.interop.base import Folder

__all__ = [
    "print_adapters",
    "print_bench",
    "print_builds",
    "print_comparison",
    "print_inspection",
    "print_tasks",
]

# In a pipe nothing is cut off to fit a screen.
_UNCUT = 10_000


def print_bench(report: Mapping[str, Any]) -> None:
    """Print what `eptc bench` measured."""
    console = _console()
    console.print(
        f"{report['bundle']}: {report['kind']}, {report['precision']}, on "
        f"{', '.join(report['providers'])}, {report['threads']} threads, "
        f"ONNX Runtime {report['onnxruntime']}, {report['repeat']} calls each",
        soft_wrap=True,
    )
    rate = "tokens_per_second" if "tokens_per_second" in report["shapes"][0] else "rows_per_second"
    table = Table("batch", "length", "new tokens", "median ms", "p95 ms", rate.replace("_", " "))
    for shape in report["shapes"]:
        written = shape["new_tokens"]
        table.add_row(
            str(shape["batch"]), str(shape["length"]), "" if written is None else str(written),
            f"{shape['median_ms']:.2f}", f"{shape['p95_ms']:.2f}", f"{shape[rate]:.1f}",
        )  # fmt: skip
    console.print(table)


def print_builds(report: Report) -> None:
    """Print how each build of a plan ended."""
    table = Table("build", "", "size", "seconds", "why")
    for outcome in report.outcomes:
        built = outcome.state == "built"
        table.add_row(
            outcome.name, outcome.state, f"{outcome.size:,}" if outcome.size else "",
            f"{outcome.seconds:.1f}" if built else "", (outcome.error or "").partition("\n")[0],
        )  # fmt: skip
    _console().print(table)


def print_comparison(comparison: Comparison) -> None:
    """Print what `--precision all` made, one precision a line."""
    from eptc.comparison_report import notes, table

    console = _console()
    heads, lines = table(comparison)
    found = Table(*heads)
    for line in lines:
        found.add_row(*line)
    console.print(found)
    for note in notes(comparison):
        console.print(note, soft_wrap=True)


def print_adapters(folder: Folder) -> None:
    """Print the adapters of a folder, one a line."""
    cut = any(folder.details[task]["lost"] for task in folder.tasks)
    lost = ("lost, worst", "lost, mean") if cut else ()
    table = Table("task", "rank", "rounding", *lost, "largest error", "flips")
    for task in folder.tasks:
        found, parity = folder.details[task], folder.parity[task]
        shares = [found["lost"][key] for key in ("worst", "mean")] if cut else []
        verified = parity["verified"]
        table.add_row(
            task, str(found["rank"]), f"{found['rounding']:.1e}",
            *(f"{100 * share:.2g} %" for share in shares),
            f"{parity['largest_error']:.2g}" if verified else "not verified",
            str(parity["flips"]) if verified else "",
        )  # fmt: skip
    _console().print(table)


def print_inspection(report: Mapping[str, Any]) -> None:
    """Print what `eptc inspect` found."""
    console = _console()
    if report["what"] == "bundle":
        _bundle(console, report)
    elif report["what"] == "pack":
        _pack(console, report)
    else:
        _checkpoint(console, report)


def print_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the tasks of a pack, one a line.

    Args:
        tasks: what `PackTask.told` says of each, by its name in the pack.
    """
    table = Table(
        "name", "task", "kind", "labels", "rank", "linears", "bytes", "format", "verified"
    )
    for name, told in tasks.items():
        table.add_row(
            name, told["task"], told["kind"], _short(told["labels"]), str(told["rank"]),
            str(told["linears"]), f"{told['bytes']:,}", told["format"],
            "yes" if told["verified"] else "no",
        )  # fmt: skip
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _UNCUT
    return console


def _bundle(console: Console, report: Mapping[str, Any]) -> None:
    task = report["task"]
    console.print(f"bundle {report['path']}: {report['kind']}, {report['precision']}, "
                  f"opset {report['opset']}")  # fmt: skip
    for place, each in enumerate(report["tasks"] or []):
        labels = f", labels {_short(each['labels'])}" if each["labels"] else ""
        console.print(f"task {place} {each['name']} ({each['kind']}){labels}", soft_wrap=True)
    if task is not None:
        labels = f", labels {', '.join(task['labels'])}" if task["labels"] else ""
        console.print(f"task {task['name']} ({task['kind']}){labels}", soft_wrap=True)
    console.print(f"routing {report['routing']['mode']}: {report['routing']['meaning']}",
                  soft_wrap=True)  # fmt: skip
    parity = report["parity"]
    if not parity.get("verified"):
        console.print("not verified against a reference")
    for line in parity_lines(parity):
        console.print(line, soft_wrap=True)
    _files(console, report["files"])
    table = Table("pass", "contract", "of its bound", "options")
    for step in report["passes"]:
        error = step.get("error")
        table.add_row(step["name"], step["contract"], "" if error is None else f"{error:.2g}",
                      _options(step["options"]))  # fmt: skip
    console.print(table)


def _pack(console: Console, report: Mapping[str, Any]) -> None:
    console.print(
        f"pack {report['path']}: {report['kind']}, fp32, opset {report['opset']}; "
        f"{len(report['linears'])} linears that tasks may adapt",
        soft_wrap=True,
    )
    entries = {name: PackTask.from_json(entry, name) for name, entry in report["tasks"].items()}
    print_tasks({name: entry.told() for name, entry in entries.items()})
    for name, entry in entries.items():
        for line in parity_lines(entry.parity):
            console.print(f"{name}: {line}", soft_wrap=True)
    _files(console, report["files"])


def _files(console: Console, files: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("file", "bytes", "sha256")
    for name, record in files.items():
        table.add_row(name, f"{record['size']:,}", record["sha256"][:16])
    console.print(table)


def _checkpoint(console: Console, report: Mapping[str, Any]) -> None:
    base = report["base"]
    console.print(
        f"{report['format']} checkpoint {report['path']}: variant {report['variant']}, "
        f"{report['adapted_linears']} linears of a {base['model_type']} {base['kind']}",
        soft_wrap=True,
    )
    console.print(f"routing {report['routing']['mode']}: {report['routing']['meaning']}",
                  soft_wrap=True)  # fmt: skip
    if report["kernel_sizes"]:
        console.print(f"experts {report['kernel_sizes']}, top-k {report['top_k']}")
    if tucka := report.get("tucka"):
        console.print(
            f"{tucka['k']} groups of {tucka['t']} experts, rank {tucka['r']}, alpha "
            f"{tucka['alpha']:g}; the router reads the input of {tucka['router']}",
            soft_wrap=True,
        )
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"adapters {report['adapter_bytes']:,} bytes, heads {report['head_bytes']:,}; "
                  f"engine about {report['predicted_weight_bytes']:,} bytes")  # fmt: skip
    table = Table("id", "task", "kind", "labels", "aliases", "smallest margin", "looks trained")
    for task in report["tasks"]:
        margins = [r["margin"] for r in report["routes"][task["name"]].values() if r]
        known = [m for m in margins if m is not None]
        trained = task["looks_trained"]
        table.add_row(
            str(task["id"]), task["name"], task["kind"], _short(task["labels"]),
            ", ".join(task["aliases"]), f"{min(known):.2g}" if known else "",
            "" if trained is None else ("yes" if trained else "no"),
        )  # fmt: skip
    console.print(table)
    table = Table("linear", *report["routes"])
    for path in next(iter(report["routes"].values())):
        cells = [_experts(routes[path]) for routes in report["routes"].values()]
        if any(cells):
            table.add_row(path, *cells)
    if table.row_count:
        console.print(table)


def _options(options: Mapping[str, Any]) -> str:
    """Return a pass's options; gates, of which there are some for each linear, by their spread."""
    return ", ".join(
        f"thrown away: {thrown_away(value)}" if name == "spread" else f"{name}={value}"
        for name, value in options.items()
        if name != "gates"
    )


def _short(labels: list[str]) -> str:
    return ", ".join(labels) if len(labels) <= 4 else f"{len(labels)}: {labels[0]} .. {labels[-1]}"


def _experts(route: Mapping[str, Any] | None) -> str:
    if route is None:
        return ""
    return " ".join(
        f"{e}:{w:.2f}" for e, w in zip(route["experts"], route["weights"], strict=True)
    )
