"""`python -m benchmarks.tasks`: what eight tasks in one engine cost beside one task's engine.

Two engines of one checkpoint, asked in turn in every round: the one of a single task, its experts
folded, and the one of all eight, whose rows are of each task in turn. Their answers are compared
first, on rows of that task.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.models import MODELS, Model, write_base
from benchmarks.places import RESULTS, ROOT
from benchmarks.random_checkpoint import RANK, TASKS, TOP_K, write_checkpoint
from benchmarks.routing import once
from benchmarks.statistics import order_of_rounds, paired_ratio
from benchmarks.turns import difference, random_feeds, session_call, turn
from benchmarks.versions import installed

__all__ = ["main", "measure"]

ALONE, TOGETHER = "one task's engine", "engine of eight tasks"
SHAPES = ((1, 32), (8, 128))
# The linears that are adapted where the model's own checkpoint has other tasks.
_TARGETS = {"minilm": ("query", "key", "value", "dense")}
# Tokens a decoder has written before the step that is measured.
_PAST = 16
_SEED = 0
_CLOCKS: Mapping[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "thread": time.thread_time,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that were asked for; write a JSON file for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--models", default="minilm,t5-base", help="comma separated")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=machine.threads_available())
    parser.add_argument(
        "--clock",
        choices=tuple(_CLOCKS),
        default="wall",
        help="thread: processor time of one thread, for a machine that has other work",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.clock == "thread" and options.threads != 1:
        parser.error("--clock thread measures one thread: give --threads 1")
    out: Path = options.results / "tasks"
    out.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        text = json.dumps(measure(MODELS[name], options), indent=1)
        (out / f"{name}-{options.clock}-{options.threads}.json").write_text(f"{text}\n")


def measure(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on one model, as JSON values; print it."""
    folders = _written(model, options.folder / "tasks" / model.name)
    print(f"{model.name}, rank {RANK * TOP_K}: {TOGETHER} as a multiple of {ALONE}\n"
          "graph    batch x tokens    alone ms   ratio")  # fmt: skip
    cases = []
    for graph in sorted(path.stem for path in folders[ALONE].glob("*.onnx")):
        sessions = {
            name: _session(folder / f"{graph}.onnx", options.threads)
            for name, folder in folders.items()
        }
        for batch, sequence in SHAPES:
            feeds = _feeds(sessions[TOGETHER], batch, sequence)
            calls = {name: session_call(session, feeds) for name, session in sessions.items()}
            own = {**feeds, "task_ids": np.full(batch, _place(model))}
            off = difference(session_call(sessions[TOGETHER], own)(), calls[ALONE]())
            seconds = _timed(calls, options.rounds, _CLOCKS[options.clock])
            ratio = paired_ratio(seconds[TOGETHER], seconds[ALONE], seed=_SEED)
            medians = {n: round(1e3 * float(np.median(each)), 3) for n, each in seconds.items()}
            cases.append({
                "graph": graph, "batch": batch, "sequence": sequence, "off_by": off,
                "milliseconds": medians, "ratio": dataclasses.asdict(ratio),
            })  # fmt: skip
            low, high = ratio.low or ratio.estimate, ratio.high or ratio.estimate
            print(f"{graph:8} {batch:2} x {sequence:<10} "
                  f"{medians[ALONE]:10.2f}   {ratio.estimate:.3f} "
                  f"({low:.3f}-{high:.3f})", flush=True)  # fmt: skip
        del sessions
        gc.collect()
    return {
        "model": model.name,
        "tasks": TASKS,
        "rank": RANK * TOP_K,
        "cases": cases,
        "bytes": {name: _size(folder) for name, folder in folders.items()},
        "conditions": {
            "machine": dataclasses.asdict(machine.describe()), "threads": options.threads,
            "rounds": options.rounds, "clock": options.clock, "versions": installed(),
        },
    }  # fmt: skip


def _place(model: Model) -> int:
    """Return which of the eight tasks stands alone."""
    return int(model.task.partition("-")[2] or 3)


def _written(model: Model, place: Path) -> dict[str, Path]:
    """Write what is measured, unless it is there."""
    import eptc

    base, checkpoint = place / "base", place / "checkpoint"
    targets = _TARGETS.get(model.name, model.targets)
    once(base, lambda out: write_base(model, out))
    once(checkpoint, lambda out: write_checkpoint(base, out, targets))
    folders = {ALONE: place / "alone", TOGETHER: place / "together"}
    for folder, task in ((folders[ALONE], _place(model)), (folders[TOGETHER], "all")):
        if not folder.is_dir():
            eptc.export(checkpoint, base=base, task=task, out=folder, verify=False)
    return folders


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # as eptc's runtime has it
    # Two sessions share the processors: whose turn it is not must not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, batch: int, sequence: int) -> dict[str, Any]:
    """Return inputs of a graph: random tokens; of a decoder the step after some others."""
    decodes = any(node.name.startswith("past_key_values") for node in session.get_inputs())
    sizes = {
        "batch": batch, "sequence": 1 if decodes else sequence, "past_sequence": _PAST,
        "encoder_sequence": sequence,
    }  # fmt: skip
    feeds = random_feeds(session, sizes, _SEED)
    if "task_ids" in feeds:
        feeds["task_ids"] = np.arange(batch) % TASKS
    return feeds


def _timed(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of each in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for order in order_of_rounds(list(calls), rounds, seed=_SEED):
        for name in order:
            seconds[name].append(turn(calls[name], clock))
    return seconds


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
