"""`python -m benchmarks.routing`: what experts that are chosen by token cost beside their base.

Three sessions of one model, asked in turn in every round: the base's engine, eptc's engine with
routed experts, and what torch.onnx.export makes of the PyTorch module. Answers are compared first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.models import MODELS, make
from benchmarks.places import RESULTS, ROOT, Files
from benchmarks.routed_graphs import (
    write_base_graphs,
    write_checkpoint,
    write_engine,
    write_exported,
)
from benchmarks.statistics import order_of_rounds, paired_ratio, turn_value
from benchmarks.versions import installed

__all__ = ["main"]

BASE, ENGINE, EXPORTED = "base model's engine", "eptc engine", "torch.onnx.export of the module"
# Of a model whose checkpoint the suite does not make: every linear of its layers.
TARGETS = ("query", "key", "value", "intermediate.dense", "output.dense")
SHAPES = ((1, 32), (8, 128))
# A turn lasts this long, seconds, or three calls.
_TURN = 0.25
# Tokens a decoder has written before the step that is measured.
_PAST = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that were asked for; write a JSON file for each."""
    options = _parser().parse_args(arguments)
    for model in options.models.split(","):
        place = options.folder / f"routing-{model}{'-shared' if options.shared else ''}"
        found = measure(model, place, options)
        out: Path = options.results / "routing"
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{place.name.removeprefix('routing-')}.json").write_text(
            json.dumps(found, indent=1) + "\n"
        )
        print(table(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--models", default="minilm,t5-base", help="comma separated")
    parser.add_argument("--shared", action="store_true", help="one A and B for all linears")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=machine.threads_available())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def measure(model: str, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on one model, as JSON values."""
    folders = _written(model, place, shared=options.shared)
    cases = []
    for graph in sorted(path.stem for path in folders[BASE].glob("*.onnx")):
        sessions = {
            name: _session(folder / f"{graph}.onnx", options.threads)
            for name, folder in folders.items()
        }
        for batch, sequence in SHAPES:
            feeds = _feeds(sessions[BASE], batch, sequence, options.seed)
            calls = {name: _call(session, feeds) for name, session in sessions.items()}
            cases.append(
                {
                    "graph": graph, "batch": batch, "sequence": sequence,
                    "exported_off_by": _difference(calls[ENGINE](), calls[EXPORTED]()),
                    **_timed(calls, options.rounds, options.seed),
                }
            )  # fmt: skip
        del sessions
        gc.collect()
    return {
        "model": model,
        "shared": options.shared,
        "cases": cases,
        "conditions": {
            "machine": dataclasses.asdict(machine.describe()), "threads": options.threads,
            "rounds": options.rounds, "seed": options.seed, "versions": installed(),
        },
    }  # fmt: skip


def _written(model: str, place: Path, *, shared: bool) -> dict[str, Path]:
    """Write what is measured, unless it is there."""
    folders = {BASE: place / "plain", ENGINE: place / "engine", EXPORTED: place / "exported"}
    if (place / "made").is_file():
        return folders
    shutil.rmtree(place, ignore_errors=True)
    files = Files(place)
    make(dataclasses.replace(MODELS[model], timed=False), files)
    shutil.rmtree(files.checkpoint)
    targets = MODELS[model].targets or TARGETS
    write_checkpoint(files.base, files.checkpoint, targets, shared=shared)
    write_base_graphs(files.checkpoint, files.base, folders[BASE])
    write_engine(files.checkpoint, files.base, folders[ENGINE])
    write_exported(files.checkpoint, files.base, folders[EXPORTED])
    (place / "made").touch()
    return folders


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Three sessions share the processors: whose turn it is not must not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, batch: int, sequence: int, seed: int) -> dict[str, Any]:
    """Return inputs of a graph: random tokens; of a decoder the step after some others."""
    rng = np.random.default_rng(seed)
    decodes = any(node.name.startswith("past_key_values") for node in session.get_inputs())
    sizes = {
        "batch": batch, "sequence": 1 if decodes else sequence, "past_sequence": _PAST,
        "encoder_sequence": sequence,
    }  # fmt: skip
    feeds = {}
    for node in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes[size] for size in node.shape]
        if node.type == "tensor(float)":
            feeds[node.name] = rng.standard_normal(shape).astype(np.float32)
        elif "mask" in node.name:
            feeds[node.name] = np.ones(shape, np.int64)
        else:
            feeds[node.name] = rng.integers(4, 60, shape) * (node.name == "input_ids")
    return feeds


def _call(session: Any, feeds: Mapping[str, Any]) -> Callable[[], Any]:
    wanted = {node.name for node in session.get_inputs()}
    taken = {name: array for name, array in feeds.items() if name in wanted}
    first = session.get_outputs()[0].name
    return lambda: session.run([first], taken)[0]


def _difference(a: Any, b: Any) -> float:
    """Return how far two answers are apart, as a part of the largest number: two digits."""
    return float(f"{np.abs(a - b).max() / np.abs(b).max():.1e}")


def _timed(calls: Mapping[str, Callable[[], Any]], rounds: int, seed: int) -> dict[str, Any]:
    """Return the median seconds of each, and the paired ratios to the base's engine."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for order in order_of_rounds(list(calls), rounds, seed=seed):
        for name in order:
            seconds[name].append(_turn(calls[name]))
    ratios = {
        name: dataclasses.asdict(paired_ratio(seconds[name], seconds[BASE], seed=seed))
        for name in (ENGINE, EXPORTED)
    }
    ours, theirs = (np.array(seconds[n]) / np.array(seconds[BASE]) - 1 for n in (ENGINE, EXPORTED))
    return {
        "milliseconds": {n: round(1e3 * float(np.median(s)), 3) for n, s in seconds.items()},
        "ratio_to_base": ratios,
        "overhead_to_exported": dataclasses.asdict(paired_ratio(ours, theirs, seed=seed)),
    }


def _turn(call: Callable[[], Any]) -> float:
    """Call for a while; return the median."""
    seconds: list[float] = []
    while sum(seconds) < _TURN or len(seconds) < 3:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return turn_value(seconds)


def table(found: Mapping[str, Any]) -> str:
    """Return what was measured on one model as text."""
    lines = [
        f"{found['model']}: {ENGINE} and {EXPORTED}, as multiples of the {BASE}",
        "graph    batch x tokens   base ms   eptc   export   overhead of eptc / of export",
    ]
    for case in found["cases"]:
        ratios = case["ratio_to_base"]
        lines.append(
            f"{case['graph']:8} {case['batch']:2} x {case['sequence']:<10} "
            f"{case['milliseconds'][BASE]:9.2f} {ratios[ENGINE]['estimate']:6.2f} "
            f"{ratios[EXPORTED]['estimate']:8.2f} {case['overhead_to_exported']['estimate']:12.2f}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
