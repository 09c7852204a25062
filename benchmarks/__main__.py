"""`python -m benchmarks`: run the suite. `make bench` sets up what it needs first."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases, machine
from benchmarks.builds import BUILDS, BuildCase, run_build
from benchmarks.cases import Case
from benchmarks.figure import draw
from benchmarks.latency import Settings, run_case
from benchmarks.models import MODELS
from benchmarks.places import RESULTS, ROOT, Files
from benchmarks.processes import Environments, WorkerError, environment
from benchmarks.report import report
from benchmarks.results import Results, read, write

__all__ = ["main"]

_QUICK_ROUNDS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit code: 1 where a benchmark could not run."""
    options = _parser().parse_args(arguments)
    out: Path = options.results
    code = 0
    if not options.report:
        try:
            chosen, builds = _select([name for name in options.cases.split(",") if name])
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        settings = Settings(
            Environments(options.optimum_python),
            options.threads,
            options.seed,
            rounds=_QUICK_ROUNDS if options.quick else None,
            only=tuple(name for name in options.only.split(",") if name),
        )
        models = dict.fromkeys([*(c.model for c in chosen), *(b.model for b in builds)])
        for model in models:
            print(model, flush=True)
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


def _select(names: list[str]) -> tuple[list[Case], list[BuildCase]]:
    if not names:
        return cases.select([]), [b for b in BUILDS if not b.name.startswith("tiny")]
    builds = [build for build in BUILDS if build.name.startswith(tuple(names))]
    rest = [n for n in names if not any(build.name.startswith(n) for build in builds)]
    found = [case for case in cases.CASES if case.name.startswith(tuple(names))]
    if rest:
        cases.select(rest)  # raises for a name that fits nothing
    return found, builds


def _run_model(
    model: str,
    chosen: Sequence[Case],
    builds: Sequence[BuildCase],
    settings: Settings,
    options: argparse.Namespace,
) -> int:
    """Run one model's benchmarks and write its results; return 1 where one could not run."""
    files = Files(options.folder / model)
    _make(model, files)
    code = 0
    found, built = [], []
    versions: dict[str, dict[str, str]] = {}
    for case in chosen:
        print(f" {case.name}", flush=True)
        try:
            result, used = run_case(case, files, settings)
        except WorkerError as error:
            print(f"  {error}", file=sys.stderr, flush=True)
            code = 1
            continue
        found.append(result)
        versions |= used
    for build in builds:
        print(f" {build.name}", flush=True)
        built.append(run_build(build, files, settings))
        code |= any(measure.status == "failed" for measure in built[-1].measures)
        if build.removed:
            shutil.rmtree(files.root)
    results = Results(
        model, machine.revision(), settings.seed, settings.threads, settings.rounds is not None,
        machine.describe(), versions, tuple(found), tuple(built),
    )  # fmt: skip
    write(results, options.results / f"{model}.json")
    return code


def _make(model: str, files: Files) -> None:
    """Make a model in a process of its own, unless it is there."""
    done = files.root / "made"
    if done.is_file():
        return
    print(" making the model", flush=True)
    subprocess.run(  # noqa: S603  # our own module
        [sys.executable, "-m", "benchmarks.models", MODELS[model].name, str(files.root)],
        check=True, cwd=ROOT, env=environment(machine.threads_available()),
    )  # fmt: skip
    done.touch()


def _write_report(out: Path) -> None:
    order = {name: i for i, name in enumerate(MODELS)}
    found = [read(path) for path in out.glob("*.json")]
    found.sort(key=lambda result: order.get(result.model, len(order)))
    text = report(found)
    (out / "report.md").write_text(text)
    print(text)
    if any(result.cases for result in found):
        draw(found, out / "latency.svg")


if __name__ == "__main__":
    sys.exit(main())
