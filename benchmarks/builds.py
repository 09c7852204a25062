"""Builds: wall time and peak memory of whole commands, each in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.places import Files
from benchmarks.processes import Usage, WorkerError, measured
from benchmarks.results import Build, Measure, Ratio
from benchmarks.settings import Settings
from benchmarks.statistics import order_of_rounds, paired_ratio

__all__ = ["BUILDS", "BuildCase", "run_build"]

_EPTC = "from eptc.cli import main; main()"
_COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])"
_OPTIMUM_TASK = "from optimum.exporters.onnx.__main__ import main; main()"
_TASK, _SECOND_TASK = "task-3", "task-4"
# What is divided by what.
_PAIRS = (
    ("second", "cold"), ("cold", "optimum"), ("parity", "optimum"), ("keep", "copy"),
    ("int4", "copy"), ("hf", "copy"), ("hf-keep", "copy"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BuildCase:
    """The builds of one model.

    Args:
        name: unique; starts with the model's name.
        model: a name in `models.MODELS`.
        groups: steps that run in a given order; the groups' order is drawn for each round.
            `cold`: `eptc export --no-verify` of a task, the skeleton cache empty. `second`: of
            another task of the checkpoint, with that cache. `parity`: cold, parity proven.
            `optimum`: optimum-onnx's export of the merged model, its own validation included.
            `keep`, `int4`: `eptc export --no-verify` with that precision. `hf`, `hf-keep`:
            `eptc export --target hf`, in float32 or the base's type, each tensor compared, within
            2 GB. `copy`: a copy of the base.
        rounds: times each runs.
        disk: free bytes it needs beside the model.
        removed: whether the model is removed when all builds of it are done.
    """

    name: str
    model: str
    groups: tuple[tuple[str, ...], ...]
    rounds: int
    disk: int = 0
    removed: bool = False


BUILDS = (
    BuildCase(
        "t5-base-build", "t5-base", (("cold", "second"), ("parity",), ("optimum",)), rounds=3,
        disk=8 * 2**30,
    ),
    BuildCase(
        "llama-2-7b-build", "llama-2-7b", (("copy",), ("keep",), ("int4",)), rounds=2,
        disk=20 * 2**30,
        removed=True,
    ),
    BuildCase(
        "llama-2-7b-folder", "llama-2-7b", (("copy",), ("hf",), ("hf-keep",)), rounds=1,
        disk=30 * 2**30,
        removed=True,
    ),
    BuildCase("tiny-t5-build", "tiny-t5", (("cold", "second"), ("copy",), ("hf",)), rounds=1),
)  # fmt: skip


def run_build(build: BuildCase, files: Files, settings: Settings) -> Build:
    """Run a build benchmark. A step that fails is reported as such and not tried again."""
    rounds = 1 if settings.rounds else build.rounds
    usages: dict[str, list[Usage]] = {step: [] for group in build.groups for step in group}
    reasons: dict[str, str] = {}
    sizes: dict[str, int] = {}
    load = machine.Load([os.getpid()])
    names = [str(i) for i in range(len(build.groups))]
    for number, order in enumerate(order_of_rounds(names, rounds, seed=settings.seed)):
        for step in (step for i in order for step in build.groups[int(i)]):
            if step in reasons:
                continue
            settings.say(f"  {step}, round {number + 1} of {rounds}")
            out = files.root / "built" / step
            try:
                usages[step].append(_run(step, files, out, settings, build))
                sizes[step] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            except WorkerError as error:
                reasons[step] = str(error)
                settings.say(f"  {step}: cannot run: {error}")
            shutil.rmtree(out, ignore_errors=True)
    measures = tuple(
        _measure(step, found, reasons.get(step), sizes.get(step)) for step, found in usages.items()
    )
    weights = sum(p.stat().st_size for p in files.base.glob("*.safetensors"))
    return Build(
        build.name, build.model, measures, _ratios(measures, settings.seed), weights,
        load.foreign(),
    )  # fmt: skip


def _measure(step: str, found: Sequence[Usage], reason: str | None, size: int | None) -> Measure:
    return Measure(
        step,
        "failed" if reason else "measured",
        reason,
        tuple(round(usage.seconds, 3) for usage in found),
        tuple(usage.own_rss for usage in found),
        tuple(usage.tree_rss for usage in found),
        size,
    )


def _ratios(measures: Sequence[Measure], seed: int) -> dict[str, Ratio]:
    by_name = {m.name: m for m in measures if m.status == "measured"}
    ratios = {}
    for a, b in _PAIRS:
        if a in by_name and b in by_name:
            one, other = by_name[a], by_name[b]
            ratios[f"{a} / {b}, seconds"] = paired_ratio(one.seconds, other.seconds, seed=seed)
            if b != "copy":
                ratios[f"{a} / {b}, peak memory"] = paired_ratio(
                    one.peak_rss, other.peak_rss, seed=seed
                )
    return ratios


def _run(step: str, files: Files, out: Path, settings: Settings, build: BuildCase) -> Usage:
    """Run one step; what it wrote has reached the disk when the clock stops."""
    free = shutil.disk_usage(files.root).free
    if free < build.disk:
        raise WorkerError(f"{free / 2**30:.0f} GiB of disk are free, not {build.disk >> 30}")
    cache = files.root / "skeleton-cache"
    if step != "second":
        shutil.rmtree(cache, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    command = _command(step, files, out, settings, build)
    os.sync()  # nothing of the step before is left to write
    usage = measured(
        command, threads=settings.threads, extra={"EPTC_CACHE_DIR": str(cache)},
        log=files.root / f"{build.name}.{step}.log",
    )  # fmt: skip
    start = time.perf_counter()
    os.sync()
    if usage.code:
        raise WorkerError(f"exit code {usage.code}: {usage.error[-300:].strip()}")
    return dataclasses.replace(usage, seconds=usage.seconds + time.perf_counter() - start)


def _command(
    step: str, files: Files, out: Path, settings: Settings, build: BuildCase
) -> list[str]:
    if step == "copy":
        return [sys.executable, "-c", _COPY, str(files.base), str(out)]
    if step == "optimum":
        task = {"t5-base": "text2text-generation-with-past"}[build.model]
        python = settings.environments.python("optimum")
        options = ["--model", str(files.merged), "--task", task, str(out)]
        return [python, "-c", _OPTIMUM_TASK, *options]
    task = _SECOND_TASK if step == "second" else _TASK
    options = ["--task", task, "--base", str(files.base), "--out", str(out)]
    if step.startswith("hf"):
        options += ["--target", "hf", "--max-memory", "2GB"]
        options += ["--precision", "keep" if step == "hf-keep" else "fp32"]
    elif step != "parity":
        options.append("--no-verify")
    if step in ("keep", "int4"):
        options += ["--precision", step]
    return [sys.executable, "-c", _EPTC, "export", str(files.checkpoint), *options]
