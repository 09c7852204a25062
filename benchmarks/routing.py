"""`python -m benchmarks.routing`: what experts that are chosen by the input cost beside the base.

Three sessions of one model, asked in turn in every round: the base's engine, eptc's engine with
routed experts, and what torch.onnx.export makes of the PyTorch module. Answers are compared first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.models import MODELS, Model, write_base
from benchmarks.places import RESULTS, ROOT
from benchmarks.routed_checkpoints import PROMPTS, VARIANTS, Variant
from benchmarks.routed_graphs import write_base_graphs, write_engine, write_exported
from benchmarks.statistics import order_of_rounds, paired_overheads, paired_ratio
from benchmarks.turns import difference, random_feeds, session_call, turn
from benchmarks.versions import installed

__all__ = ["main", "measure", "once", "pairs"]

BASE, ENGINE, EXPORTED = "base model's engine", "eptc engine", "torch.onnx.export of the module"
SHAPES = ((1, 32), (8, 128))
# Tokens a decoder has written before the step that is measured.
_PAST = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the systems that were asked for; write a JSON file for each on each model."""
    parser = _parser()
    options = parser.parse_args(arguments)
    found = list(pairs(options.models.split(","), options.systems.split(",")))
    if not found:
        parser.error(f"no system of {options.systems} runs on {options.models}")
    out: Path = options.results / "routing"
    out.mkdir(parents=True, exist_ok=True)
    for model, variant in found:
        text = json.dumps(measure(model, variant, options), indent=1)
        short = f"-{options.layers}-layers" if options.layers is not None else ""
        (out / f"{model}{short}-{variant.name}.json").write_text(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--models", default="minilm,t5-base", help="comma separated")
    parser.add_argument(
        "--systems",
        default="ept,tucka,mept,smop",
        help="comma separated: all whose names begin so, of "
        + ", ".join(variant.name for variant in VARIANTS),
    )
    parser.add_argument(
        "--layers",
        type=int,
        help="layers of each stack, where the weights are random anyway: "
        "exporting the module takes half an hour at T5-base's 12",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=machine.threads_available())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def pairs(models: Sequence[str], systems: Sequence[str]) -> Iterator[tuple[str, Variant]]:
    """Yield each model with each system that adapts models of its type."""
    for model in models:
        for variant in VARIANTS:
            asked = any(f"{variant.name}-".startswith(f"{name}-") for name in systems)
            if asked and MODELS[model].config["model_type"] in variant.model_types:
                yield model, variant


def measure(model: str, variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of one system on one model, as JSON values; print it."""
    chosen, place = MODELS[model], options.folder / "routing" / model
    if options.layers is not None:
        fewer = {
            n: options.layers for n in chosen.config if n.startswith("num_") and "layers" in n
        }
        chosen = dataclasses.replace(chosen, config={**chosen.config, **fewer})
        place = place.with_name(f"{model}-{options.layers}-layers")
    folders = _written(chosen, variant, place)
    print(
        f"{variant.name} on {model}, as multiples of the {BASE}\n"
        "graph    batch x tokens   base ms   eptc               export             overheads"
    )
    cases = []
    for graph in sorted(path.stem for path in folders[BASE].glob("*.onnx")):
        sessions = {
            name: _session(folder / f"{graph}.onnx", options.threads)
            for name, folder in folders.items()
        }
        for batch, sequence in SHAPES:
            feeds = {
                # Both have the inputs of the engine; the exporter's sizes have no names.
                name: _feeds(sessions[of], batch, sequence, options.seed)
                for name, of in ((BASE, BASE), (ENGINE, ENGINE), (EXPORTED, ENGINE))
            }
            calls = {
                name: session_call(session, feeds[name]) for name, session in sessions.items()
            }
            cases.append(
                {
                    "graph": graph, "batch": batch, "sequence": sequence,
                    "exported_off_by": difference(calls[ENGINE](), calls[EXPORTED]()),
                    **_timed(calls, options.rounds, options.seed),
                }
            )  # fmt: skip
            print(_row(cases[-1]), flush=True)
        del sessions
        gc.collect()
    return {
        "model": model,
        "layers": options.layers,
        "system": variant.name,
        "cases": cases,
        "conditions": {
            "machine": dataclasses.asdict(machine.describe()), "threads": options.threads,
            "rounds": options.rounds, "seed": options.seed, "versions": installed(),
        },
    }  # fmt: skip


def _written(model: Model, variant: Variant, place: Path) -> dict[str, Path]:
    """Write what is measured, unless it is there; the base is all variants'."""
    base, own = place / "base", place / variant.name
    checkpoint = own / "checkpoint"
    folders = {BASE: place / "plain", ENGINE: own / "engine", EXPORTED: own / "exported"}
    once(base, lambda out: write_base(model, out))
    once(checkpoint, lambda out: variant.write(base, out))
    once(folders[BASE], lambda out: write_base_graphs(checkpoint, base, out))
    once(folders[ENGINE], lambda out: write_engine(checkpoint, base, out, variant.routing))
    once(folders[EXPORTED], lambda out: write_exported(checkpoint, base, out, variant.routing))
    return folders


def once(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, whole or not at all, unless it is there."""
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    write(part)
    part.rename(folder)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Three sessions share the processors: whose turn it is not must not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, batch: int, sequence: int, seed: int) -> dict[str, Any]:
    """Return inputs of a graph: random tokens; of a decoder the step after some others."""
    decodes = any(node.name.startswith("past_key_values") for node in session.get_inputs())
    sizes = {
        "batch": batch, "sequence": 1 if decodes else sequence, "past_sequence": _PAST,
        "encoder_sequence": sequence,
    }  # fmt: skip
    if any("mask_sequence" in node.shape for node in session.get_inputs()):
        # The mask is the text's, the encoder's output has the prompts in front.
        sizes |= {"mask_sequence": sequence, "encoder_sequence": PROMPTS + sequence}
    return random_feeds(session, sizes, seed)


def _timed(calls: Mapping[str, Callable[[], Any]], rounds: int, seed: int) -> dict[str, Any]:
    """Return the median seconds of each, and the paired ratios to the base's engine."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for order in order_of_rounds(list(calls), rounds, seed=seed):
        for name in order:
            seconds[name].append(turn(calls[name]))
    ratios = {
        name: dataclasses.asdict(paired_ratio(seconds[name], seconds[BASE], seed=seed))
        for name in (ENGINE, EXPORTED)
    }
    ours, theirs = seconds[ENGINE], seconds[EXPORTED]
    overheads = paired_overheads(ours, theirs, seconds[BASE], seed=seed)
    return {
        "milliseconds": {n: round(1e3 * float(np.median(s)), 3) for n, s in seconds.items()},
        "ratio_to_base": ratios,
        "ratio_to_exported": dataclasses.asdict(paired_ratio(ours, theirs, seed=seed)),
        "overhead_to_exported": None if overheads is None else dataclasses.asdict(overheads),
    }


def _row(case: Mapping[str, Any]) -> str:
    ratios, overhead = case["ratio_to_base"], case["overhead_to_exported"]
    shown = f"{overhead['estimate']:.2f}" if overhead is not None else "-"
    return (
        f"{case['graph']:8} {case['batch']:2} x {case['sequence']:<10} "
        f"{case['milliseconds'][BASE]:9.2f}   "
        f"{_interval(ratios[ENGINE]):18} {_interval(ratios[EXPORTED]):18} {shown}"
    )


def _interval(ratio: Mapping[str, Any]) -> str:
    if ratio["low"] is None:
        return f"{ratio['estimate']:.2f}"
    return f"{ratio['estimate']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


if __name__ == "__main__":
    main()
