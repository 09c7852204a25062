"""Results as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.results import Build, CaseResult, Conditions, Ratio, Results, Timing

__all__ = ["best_exporter", "case_table", "report"]


def report(results: Sequence[Results]) -> str:
    """Return everything as Markdown."""
    parts = ["# Results", "", *_conditions(results)]
    cases = [result.case for result in results if result.case is not None]
    if cases:
        parts += ["", "## Latency", "", *_summary(cases)]
        for case in cases:
            parts += ["", f"### {case.name}", "", *case_table(case)]
    builds = [result.build for result in results if result.build is not None]
    if builds:
        parts += ["", "## Builds"]
        for build in builds:
            parts += ["", f"### {build.name}", "", *_build_table(build)]
    return "\n".join(parts) + "\n"


def _conditions(results: Iterable[Results]) -> list[str]:
    """Return what was measured under which conditions, those that are alike together."""
    names: dict[str, list[str]] = {}
    for result in results:
        names.setdefault(_described(result.conditions), []).append(result.name)
    return [f"* {', '.join(alike)}: {text}" for text, alike in names.items()]


def _described(conditions: Conditions) -> str:
    machine = conditions.machine
    packages = (
        f"{environment}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for environment, found in conditions.versions.items()
    )
    return "; ".join((
        f"commit {conditions.revision}",
        f"{machine.cpu}, {conditions.threads} threads of {machine.cpus} CPUs",
        f"{machine.memory / 2**30:.0f} GiB",
        f"{machine.system}",
        f"Python {machine.python}",
        f"seed {conditions.seed}",
        *packages,
        *(["**a quick run of few rounds**"] if conditions.quick else []),
    ))  # fmt: skip


def best_exporter(case: CaseResult) -> Timing | None:
    """Return the fastest of the other exporters' engines; None where none ran."""
    ran = [t for t in case.timings if t.family == "exporter" and t.ratio is not None]
    return max(ran, key=lambda t: t.ratio.estimate if t.ratio else 0.0, default=None)


def _summary(cases: Sequence[CaseResult]) -> list[str]:
    best = {case.name: found for case in cases if (found := best_exporter(case)) is not None}
    if not best:
        return ["No other exporter's engine ran."]
    lines = [
        "Engine / best other exporter's engine, below 1 where eptc's is faster:",
        "",
        "| case | best other | ratio | 95 % interval |",
        "|---|---|---|---|",
    ]
    for name, timing in best.items():
        assert timing.ratio is not None
        lines.append(f"| {name} | {timing.label} | {_ratio(timing.ratio)} |")
    median = statistics.median(t.ratio.estimate for t in best.values() if t.ratio)
    lines += ["", f"Median over {len(best)} cases: {median:.2f}"]
    if any(case.mode == "encode" for case in cases):
        lines += [
            "",
            "In the encoder cases eptc's engine alone computes the keys and values of the cross "
            "attention as well; in the others all do the same work.",
        ]
    return lines


def case_table(case: CaseResult) -> list[str]:
    """Return a table of one case, with the contestants that could not run and why."""
    shape = f"batch {case.batch}, {case.length} tokens"
    if case.new_tokens:
        shape += f" and {case.new_tokens} new ones"
    lines = [
        f"{case.mode}, {shape}; {case.rounds} rounds after {case.warmup} that are not counted; "
        f"others used {_share(case.foreign_cpu)} of the machine, waiting contestants "
        f"{_share(case.idle_cpu)} of a CPU.",
        "",
        "| contestant | median, ms | engine's, same rounds | engine / it | 95 % interval "
        "| eptc is | answer off by | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for timing in case.timings:
        if timing.status == "failed":
            continue
        faster = f"{1 / timing.ratio.estimate:.2f}x" if timing.ratio else ""
        off = "" if timing.difference is None else _off(case, timing.difference)
        lines.append(
            f"| {timing.label} | {_milliseconds(timing.seconds)} "
            f"| {_milliseconds(timing.engine)} | {_ratio(timing.ratio)} | {faster} | {off} "
            f"| {_size(timing.peak_rss or 0)} |"
        )
    failed = [timing for timing in case.timings if timing.status == "failed"]
    notes = [f"* {t.label} did not run: {_one_line(t.reason)}" for t in failed]
    return [*lines, "", *notes] if notes else lines


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f}"


def _off(case: CaseResult, difference: float) -> str:
    if case.mode == "generate":
        return f"{difference:.0%} of tokens" if difference else "no token"
    return f"{difference:.1e}"


def _build_table(build: Build) -> list[str]:
    lines = [
        f"Weights: {_size(build.weights)}; others used {_share(build.foreign_cpu)} of the "
        "machine.",
        "",
        "| step | seconds, each round | peak memory | with its children | written | / weights |",
        "|---|---|---|---|---|---|",
    ]
    failed = []
    for step in build.measures:
        if step.status == "failed":
            failed.append(f"* {step.name} did not run: {_one_line(step.reason)}")
            continue
        size = step.size or 0
        lines.append(
            f"| {step.name} | {', '.join(f'{value:.1f}' for value in step.seconds)} "
            f"| {_size(max(step.peak_rss))} | {_size(max(step.tree_rss))} | {_size(size)} "
            f"| {size / build.weights:.3f} |"
        )
    lines += ["", *failed] if failed else []
    ratios = [f"* {name}: {_words(ratio)}" for name, ratio in build.ratios.items()]
    return [*lines, "", *ratios]


def _ratio(ratio: Ratio | None) -> str:
    """Return two cells: estimate and interval."""
    if ratio is None:
        return "1 | "
    if ratio.low is None or ratio.high is None:
        return f"{ratio.estimate:.3f} | too few rounds"
    return f"{ratio.estimate:.3f} | {ratio.low:.3f} to {ratio.high:.3f}"


def _words(ratio: Ratio) -> str:
    interval = "" if ratio.low is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    return f"{ratio.estimate:.3f}{interval}, rounds: {ratio.rounds}"


def _one_line(reason: str | None) -> str:
    return " ".join((reason or "").split())


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.0%}"


def _size(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
