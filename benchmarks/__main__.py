"""`python -m benchmarks`: run the suite. `make bench` sets up what it needs first."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.builds import BUILDS, BuildCase, run_build
from benchmarks.cases import CASES, TRIAL, Case
from benchmarks.figure import draw
from benchmarks.latency import run_case
from benchmarks.models import MODELS
from benchmarks.places import RESULTS, ROOT, Files
from benchmarks.processes import Environments, WorkerError, environment
from benchmarks.report import report
from benchmarks.results import Conditions, Results, read, write
from benchmarks.settings import Settings
from benchmarks.versions import installed

__all__ = ["main"]

_QUICK_ROUNDS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code: 1 where a benchmark could not run."""
    options = _parser().parse_args(arguments)
    out: Path = options.results
    code = 0
    if not options.report:
        try:
            chosen, builds = _select(_names(options.cases), quick=options.quick)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        settings = Settings(
            Environments(options.optimum_python),
            options.threads,
            options.seed,
            rounds=_QUICK_ROUNDS if options.quick else None,
            only=tuple(_names(options.only)),
        )
        models = dict.fromkeys([*(c.model for c in chosen), *(b.model for b in builds)])
        for model in models:
            print(model)
            code |= _run_model(
                model,
                [case for case in chosen if case.model == model],
                [build for build in builds if build.model == model],
                settings,
                options,
            )
    _write_report(out)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", default="", help="beginnings of names, comma separated")
    parser.add_argument("--only", default="", help="contestants beside the engine")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds a case")
    parser.add_argument("--threads", type=int, default=machine.threads_available())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimum-python", type=Path, help="interpreter with optimum-onnx")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only write the report again")
    return parser


def _names(listed: str) -> list[str]:
    return [name for name in listed.split(",") if name]


def _select(names: list[str], *, quick: bool) -> tuple[list[Case], list[BuildCase]]:
    """Return the cases and builds whose name starts with one of the names.

    None: all but the trials of the suite itself, in a quick run without the builds.

    Raises:
        ValueError: a name that fits nothing.
    """
    if not names:
        whole = [b for b in BUILDS if not b.name.startswith(TRIAL)]
        return [c for c in CASES if not c.name.startswith(TRIAL)], [] if quick else whole
    known = [item.name for item in (*CASES, *BUILDS)]
    for name in names:
        if not any(item.startswith(name) for item in known):
            raise ValueError(f"there is no case {name!r}; there are {', '.join(known)}")
    prefixes = tuple(names)
    return (
        [case for case in CASES if case.name.startswith(prefixes)],
        [build for build in BUILDS if build.name.startswith(prefixes)],
    )


def _run_model(
    model: str,
    chosen: Sequence[Case],
    builds: Sequence[BuildCase],
    settings: Settings,
    options: argparse.Namespace,
) -> bool:
    """Run one model's benchmarks and write their results; return whether one could not run."""
    files = Files(options.folder / model)
    _make(model, files)
    failed = False
    for case in chosen:
        print(f" {case.name}")
        try:
            result = run_case(case, files, settings)
        except WorkerError as error:
            print(f"  {error}", file=sys.stderr)
            failed = True
            continue
        found = Results(case.name, _conditions(settings), case=result)
        write(found, options.results / f"{case.name}.json")
    for build in builds:
        print(f" {build.name}")
        built = run_build(build, files, settings)
        failed |= any(measure.status == "failed" for measure in built.measures)
        found = Results(build.name, _conditions(settings), build=built)
        write(found, options.results / f"{build.name}.json")
    if any(build.removed for build in builds):
        shutil.rmtree(files.root)
    return failed


def _conditions(settings: Settings) -> Conditions:
    return Conditions(
        machine.revision(), machine.describe(), settings.threads, settings.seed,
        settings.rounds is not None, _versions(settings),
    )  # fmt: skip


def _versions(settings: Settings) -> dict[str, dict[str, str]]:
    """Return the versions of every environment that is set up."""
    found = {"eptc": installed()}
    with contextlib.suppress(WorkerError):
        found["optimum"] = json.loads(
            subprocess.run(  # noqa: S603  # our own module
                [settings.environments.python("optimum"), "-m", "benchmarks.versions"],
                check=True, cwd=ROOT, env=environment(1), capture_output=True,
            ).stdout
        )  # fmt: skip
    return found


def _make(model: str, files: Files) -> None:
    """Make a model in a process of its own, unless it is there."""
    done = files.root / "made"
    if done.is_file():
        return
    print(" making the model")
    subprocess.run(  # noqa: S603  # our own module
        [sys.executable, "-m", "benchmarks.models", MODELS[model].name, str(files.root)],
        check=True, cwd=ROOT, env=environment(machine.threads_available()),
    )  # fmt: skip
    done.touch()


def _write_report(out: Path) -> None:
    order = [item.name for item in (*CASES, *BUILDS)]
    found = [read(path) for path in out.glob("*.json")]
    found.sort(key=lambda result: order.index(result.name))
    text = report(found)
    (out / "report.md").write_text(text)
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("latency.svg is not drawn: matplotlib is not installed", file=sys.stderr)
    elif any(result.case for result in found):
        draw(found, out / "latency.svg")


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # a run takes long: show how far it is
    sys.exit(main())
