"""`python -m benchmarks.packs`: many tasks over one base, beside a bundle of its own for each.

How large a pack is, what a task more takes to add, what switching to another task costs, in time
and memory, beside loading another bundle, and what a call costs in each form. Weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.models import MODELS, write_base
from benchmarks.places import RESULTS, ROOT
from benchmarks.processes import environment
from benchmarks.random_checkpoint import TASKS, write_checkpoint
from benchmarks.routing import once
from benchmarks.statistics import order_of_rounds, paired_ratio
from benchmarks.turns import difference, turn
from benchmarks.versions import installed

__all__ = ["main", "measure"]

SHAPES = ((1, 32), (8, 128))
SWITCHED, FOLDED, BUNDLE = "pack, factors fed", "pack, folded", "bundle of the task alone"
# Tokens that are written after the text.
_NEW = 8
# The processor time of one thread does not count what else the machine is busy with.
_CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure packs of a model; write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packs", description=__doc__)
    parser.add_argument("--model", default="t5-base")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=machine.threads_available())
    parser.add_argument(
        "--clock", choices=_CLOCKS, default="wall",
        help="of calls; thread, with --threads 1: the time that the processor spent on them",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench" / "packs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.clock == "thread" and options.threads != 1:
        parser.error("--clock thread counts one thread: give --threads 1")
    out: Path = options.results / "packs"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(measure(options), indent=1)
    (out / f"{options.model}.json").write_text(f"{text}\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, as JSON values; print it."""
    place = options.folder / options.model
    built = _built(options, place)
    found = {
        "model": options.model,
        "tasks": TASKS,
        "disk": _disk(place),
        "build_seconds": built,
        "memory": {what: _memory(what, place, options) for what in ("pack", "folded", "bundles")},
        "calls": _calls(place, options),
        "conditions": {
            "machine": dataclasses.asdict(machine.describe()), "threads": options.threads,
            "clock": options.clock, "rounds": options.rounds, "seed": options.seed,
            "versions": installed(),
        },
    }  # fmt: skip
    print(json.dumps({key: found[key] for key in ("disk", "build_seconds", "memory")}, indent=1))
    return found


def _built(options: argparse.Namespace, place: Path) -> dict[str, float]:
    """Build a pack of all tasks but one, add that one, and bundles of two tasks."""
    import eptc

    model = MODELS[options.model]
    base, checkpoint = place / "base", place / "checkpoint"
    once(base, lambda folder: write_base(model, folder, seed=options.seed))
    once(
        checkpoint,
        lambda folder: write_checkpoint(base, folder, model.targets, seed=options.seed),
    )
    tasks = [f"task-{number}" for number in range(TASKS)]
    given: dict[str, Any] = {"base": base, "verify": False}
    seconds = {}

    def timed(name: str, build: Callable[[], object]) -> None:
        start = time.perf_counter()
        build()
        seconds[name] = round(time.perf_counter() - start, 1)

    def bundle(number: int) -> None:
        out = place / f"bundle-{number}"
        shutil.rmtree(out, ignore_errors=True)
        eptc.export(checkpoint, task=tasks[number], out=out, **given)

    timed("a bundle", lambda: bundle(0))
    timed("a second bundle", lambda: bundle(1))
    pack = place / "pack"
    shutil.rmtree(pack, ignore_errors=True)
    timed(
        f"a pack of {TASKS - 1} tasks",
        lambda: eptc.export(checkpoint, task=tasks[:-1], layout="pack", out=pack, **given),
    )
    timed("a task more", lambda: eptc.add_task(pack, checkpoint, task=tasks[-1], **given))
    return seconds


def _disk(place: Path) -> dict[str, Any]:
    pack, bundle = (
        {path.name: path.stat().st_size for path in sorted((place / name).iterdir())}
        for name in ("pack", "bundle-0")
    )
    return {
        "pack": sum(pack.values()),
        "bundle": sum(bundle.values()),
        "ratio": round(sum(pack.values()) / sum(bundle.values()), 4),
        "ratio_of_bundles": TASKS,
        "files": pack,
    }


_LOADS = """
import json, sys, time
from pathlib import Path
import numpy as np
from eptc.runtime import Engine, Pack
what, place, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
feeds = {"input_ids": np.ones((1, 16), int), "attention_mask": np.ones((1, 16), int)}
def resident():
    # What is not a file's: several processes and sessions share pages of files.
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")]
pack = None
def load(number):
    global pack
    if what == "bundles":
        return Engine.load(place / f"bundle-{number}", providers=["cpu"], threads=threads)
    pack = pack or Pack.load(place / "pack", providers=["cpu"], threads=threads)
    return pack.engine(f"task-{number}", folded=what == "folded")
engines, steps, before = [], [], resident()
for number in (0, 1):
    start = time.perf_counter()
    engines.append(load(number))
    loaded = time.perf_counter()
    if engines[-1].manifest.generation:
        engines[-1].generate_ids(feeds, 2)
    else:
        engines[-1].warm_up()
    called, now = time.perf_counter(), resident()
    steps.append({
        "seconds": round(loaded - start, 4), "first_call_seconds": round(called - loaded, 4),
        "anonymous_bytes": now[0] - before[0], "resident_bytes": now[1] - before[1],
    })
    before = now
print(json.dumps({"first_task": steps[0], "second_task": steps[1]}))
"""


def _memory(what: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what loading a first task takes, and then a second beside it, in a process."""
    command = [sys.executable, "-c", _LOADS, what, str(place), str(options.threads)]
    ended = subprocess.run(  # noqa: S603  # this interpreter
        command, env=environment(options.threads), capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def _calls(place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the three engines of one task in turn: the whole of what they do for a batch."""
    from eptc.runtime import Engine, Pack

    pack = Pack.load(place / "pack", providers=["cpu"], threads=options.threads)
    engines = {
        SWITCHED: pack.engine("task-0"),
        FOLDED: pack.engine("task-0", folded=True),
        BUNDLE: Engine.load(place / "bundle-0", providers=["cpu"], threads=options.threads),
    }
    found = []
    for batch, length in SHAPES:
        calls = {
            name: _call(engine, batch, length, options.seed) for name, engine in engines.items()
        }
        answers = {name: call() for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for order in order_of_rounds(list(calls), options.rounds, seed=options.seed):
            for name in order:
                seconds[name].append(turn(calls[name], _CLOCKS[options.clock], at_least=2))
        found.append({
            "batch": batch, "tokens": length,
            "new_tokens": _NEW if engines[BUNDLE].manifest.generation else 0,
            "off_by": {name: difference(answers[name], answers[BUNDLE]) for name in calls},
            "milliseconds": {n: round(1e3 * float(np.median(s)), 3) for n, s in seconds.items()},
            "ratio_to_bundle": {
                name: dataclasses.asdict(
                    paired_ratio(seconds[name], seconds[BUNDLE], seed=options.seed)
                )
                for name in (SWITCHED, FOLDED)
            },
        })  # fmt: skip
        print(json.dumps(found[-1]["ratio_to_bundle"]), flush=True)
    return found


def _call(engine: Any, batch: int, length: int, seed: int) -> Callable[[], Any]:
    """Return what a caller of the engine asks: written tokens, else logits."""
    ids = np.random.default_rng(seed).integers(4, 60, (batch, length))
    feeds: Mapping[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if engine.manifest.generation is None:
        names = [spec.name for spec in engine.manifest.graphs["model"].inputs]
        given = {name: feeds.get(name, np.zeros_like(ids)) for name in names}
        return lambda: engine.run(given)["logits"]
    return lambda: np.array(
        [row + [0] * (_NEW - len(row)) for row in engine.generate_ids(feeds, _NEW)]
    )


if __name__ == "__main__":
    main()
