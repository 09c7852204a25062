"""`python -m benchmarks.gpu`: an engine on a GPU beside PyTorch, eager and compiled.

All of one precision and in one process, asked in turn in every round; what is compared are the
rounds' ratios. Each call takes token ids from the CPU and brings logits back to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import machine
from benchmarks.models import MODELS, Model, make
from benchmarks.places import ROOT, Files
from benchmarks.routing import once
from benchmarks.statistics import order_of_rounds, paired_ratio
from benchmarks.turns import difference, turn
from benchmarks.versions import installed

__all__ = ["CONTESTANTS", "main", "measure"]

ENGINE: Final = "engine"
CAPTURED: Final = "engine, captured"
EAGER: Final = "PyTorch eager"
COMPILED: Final = "torch.compile"
CONTESTANTS: Final = (ENGINE, CAPTURED, EAGER, COMPILED)
OUT: Final = ROOT / "benchmarks" / "gpu.json"
BATCHES: Final = (1, 8, 32)
LENGTHS: Final = (32, 128)
# How far logits of the same weights may be apart, as a part of the largest.
_APART: Final = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1}
_SEED: Final = 0
_WARMUP: Final = 3

Call = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models that were asked for and write a JSON file.

    Returns:
        2 where there is no GPU to measure on, 1 where answers differ, else 0.
    """
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and (reason := _no_gpu()):
        print(f"there is no GPU to measure on: {reason}", file=sys.stderr)
        return 2
    cases = [
        case
        for name in options.models.split(",")
        for precision in options.precisions.split(",")
        for case in measure(MODELS[name], precision, options)
    ]
    found = {"device": _device(options.device), "conditions": _conditions(options), "cases": cases}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [case for case in cases if case["off_by"] > _APART[case["precision"]]]
    for case in wrong:
        print(f"answers differ by {case['off_by']}: {case['model']}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", default="minilm", help="classifiers, comma separated")
    parser.add_argument("--precisions", default="fp32,fp16", help="comma separated")
    parser.add_argument("--contestants", type=_listed, default=CONTESTANTS, metavar="NAME;NAME")
    parser.add_argument("--batches", type=_numbers, default=BATCHES)
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser


def measure(model: Model, precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what was measured on one model in one precision, as JSON values; print it."""
    files = Files(options.folder / model.name)
    once(files.root, lambda out: make(model, Files(out)))
    bundle = files.root / "gpu" / precision
    if not bundle.is_dir():
        _export(model, files, bundle, precision)
    contestants = _Contestants(files, bundle, precision, options.device)
    print(f"{model.name} {precision} on {options.device}: times of the others by the engine's own")
    cases = []
    for batch in options.batches:
        for length in options.lengths:
            feeds = contestants.feeds(batch, length)
            calls = {name: contestants.call(name, feeds) for name in options.contestants}
            answers = {name: call() for name, call in calls.items()}
            others = [name for name in calls if name != ENGINE]
            off = max((difference(answers[ENGINE], answers[n]) for n in others), default=0.0)
            seconds = _timed(calls, options.rounds)
            ratios = {n: paired_ratio(seconds[n], seconds[ENGINE], seed=_SEED) for n in others}
            medians = {n: round(1e3 * float(np.median(each)), 4) for n, each in seconds.items()}
            cases.append({
                "model": model.name, "precision": precision, "batch": batch, "length": length,
                "off_by": off, "milliseconds": medians,
                "ratios": {name: dataclasses.asdict(ratio) for name, ratio in ratios.items()},
            })  # fmt: skip
            said = ", ".join(f"{name} {ratio.estimate:.2f}" for name, ratio in ratios.items())
            print(f"{batch:3} x {length:<4} {medians[ENGINE]:8.2f} ms  {said}", flush=True)
            del calls
            gc.collect()
    return cases


class _Contestants:
    """What is asked: two engines of one bundle, and a model of the same weights, loaded once.

    Args:
        files: the model's.
        bundle: the engine's.
        precision: of all of them.
        device: `cuda`; or `cpu`, on which nothing is captured.
    """

    def __init__(self, files: Files, bundle: Path, precision: str, device: str) -> None:
        from eptc.runtime import Engine

        captures: Any = ("cuda", {"enable_cuda_graph": "1"}) if device == "cuda" else "cpu"
        self._engine = Engine.load(bundle, [device])
        self._capturing = Engine.load(bundle, [captures])
        self._model = _pytorch(files.merged, precision, device)
        self._compiled: Any = None
        self._device = device

    def feeds(self, batch: int, length: int) -> dict[str, Any]:
        """Return random tokens, nothing masked."""
        vocabulary = self._engine.manifest.vocab_size or 2
        ids = np.random.default_rng(_SEED).integers(0, vocabulary, (batch, length))
        names = self._engine.manifest.graphs["model"].input_names
        feeds = {name: np.zeros_like(ids) for name in names}
        return feeds | {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def call(self, name: str, feeds: Mapping[str, Any]) -> Call:
        """Return what computes the logits of some feeds."""
        if name == ENGINE:
            return lambda: self._engine.run(feeds)["logits"]
        if name == CAPTURED:
            fixed = self._capturing.fixed(*feeds["input_ids"].shape)
            return lambda: fixed.run(feeds)["logits"]
        import torch

        if name == COMPILED and self._compiled is None:
            # Else it would compile for any shape from the second on: slower at each of them.
            self._compiled = torch.compile(self._model, dynamic=False)
        model = self._model if name == EAGER else self._compiled
        tensors = {key: torch.from_numpy(array) for key, array in feeds.items()}

        @torch.inference_mode()
        def call() -> Any:
            placed = {key: tensor.to(self._device) for key, tensor in tensors.items()}
            return model(**placed).logits.float().cpu().numpy()

        return call


def _pytorch(folder: Path, precision: str, device: str) -> Any:
    import torch
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = False  # as in the engine
    config = transformers.AutoConfig.from_pretrained(folder)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(folder, dtype=dtype).eval().to(device)


def _export(model: Model, files: Files, out: Path, precision: Any) -> None:
    import eptc

    out.parent.mkdir(parents=True, exist_ok=True)
    eptc.export(
        files.checkpoint, base=files.base, task=model.task, out=out, precision=precision,
        optimize_for="cuda", verify=False,
    )  # fmt: skip


def _timed(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each in every round; the first rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for order in order_of_rounds(list(calls), _WARMUP + rounds, seed=_SEED):
        for name in order:
            seconds[name].append(turn(calls[name]))
    return {name: each[_WARMUP:] for name, each in seconds.items()}


def _no_gpu() -> str | None:
    """Return why nothing can be measured on a GPU, or None."""
    import torch

    from eptc.runtime import probe_providers

    if reason := probe_providers().get("CUDAExecutionProvider", "ONNX Runtime has no CUDA"):
        return reason
    return None if torch.cuda.is_available() else "this PyTorch finds no CUDA device"


def _device(device: str) -> dict[str, Any]:
    """Return what was measured on."""
    from eptc.runtime.gpu import find_driver

    driver = find_driver()
    if device == "cpu" or isinstance(driver, str):
        return {"name": "cpu", **dataclasses.asdict(machine.describe())}
    gpu = driver.devices[0]
    return {**dataclasses.asdict(gpu), "driver": driver.version, "cuda": driver.cuda}


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "revision": machine.revision(), "machine": dataclasses.asdict(machine.describe()),
        "versions": installed(), "rounds": options.rounds, "seed": _SEED,
        "tf32": False,
    }  # fmt: skip


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _listed(text: str) -> list[str]:
    names = text.split(";")
    if ENGINE not in names or any(name not in CONTESTANTS for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: {ENGINE!r}, and others of {CONTESTANTS}")
    return names


if __name__ == "__main__":
    sys.exit(main())
