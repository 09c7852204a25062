"""`python -m benchmarks.precisions`: what each precision costs on the example's four tasks.

Scores are on rows that were held out of training; ranges and plans are made on others, which were
trained on. It needs the packages that `examples/train_multitask.py` reads its text from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import eptc
from benchmarks import machine
from benchmarks.places import RESULTS, ROOT
from benchmarks.versions import installed
from eptc.errors import ParityError
from eptc.parity_gate import (
    answers,
    compare_answers,
    read_examples,
    right_answers,
)
from eptc.precision import SCHEMES
from eptc.tasks import Task

sys.path.insert(0, str(ROOT / "examples"))

from minilm import minilm_path  # beside the example's modules
from multitask.rows import Row
from multitask.tasks import load

__all__ = ["main"]

CHECKPOINT = ROOT / "examples" / "minilm-multitask"
# Rows to see ranges of activations on, and to search a plan on.
_CALIBRATION, _SEARCH = 256, 1500
_DROP = 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    """Build every precision of every task, and a plan for half a point; write the results."""
    options = _parser().parse_args(arguments)
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    for data in load(options.data.expanduser()):
        name = data.task.name
        print(name)
        place = folder / name
        place.mkdir(parents=True)
        rows = list(data.train)
        random.Random(0).shuffle(rows)  # noqa: S311  # no secret
        calibration = _write(place / "calibration.jsonl", data.task, rows[:_CALIBRATION])
        seen = _write(place / "search.jsonl", data.task, rows[:_SEARCH])
        held_out = _write(place / "held-out.jsonl", data.task, data.held_out)
        common: dict[str, Any] = {"base": minilm_path(), "task": name}
        comparison = eptc.compare_precisions(
            CHECKPOINT, out=place / "all", data=held_out, calibration=calibration,
            max_drop=100.0, precisions=[name for name in SCHEMES if name != "auto"], **common,
        )  # fmt: skip
        auto = _auto(place, seen, held_out, data.task, common)
        out = options.results / "precisions"
        out.mkdir(exist_ok=True)
        for suffix in ("md", "svg"):
            shutil.copy(place / "all" / f"comparison.{suffix}", out / f"{name}.{suffix}")
        on = dataclasses.asdict(machine.describe())
        conditions = {"machine": on, "versions": installed()}
        found = {**comparison.to_json(), "path": None, "auto": auto, "conditions": conditions}
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print((place / "all" / "comparison.md").read_text())
        print("auto:", json.dumps(auto, indent=1))


def _auto(
    place: Path, seen: Path, held_out: Path, task: Task, common: dict[str, Any]
) -> dict[str, Any]:
    """Search a plan on rows of training, and score it on the held-out ones."""
    try:
        found = eptc.export(
            CHECKPOINT, out=place / "auto", precision="auto", data=seen, max_drop=_DROP, **common
        )
    except ParityError as error:
        return {"refused": error.found}
    plan = json.loads((found.path / "precision.json").read_text())
    examples = read_examples(held_out, task, labelled=True)
    both = []
    for folder in (place / "all" / "fp32", found.path):
        with eptc.Engine.load(folder, providers=["cpu"]) as engine:
            both.append(answers(engine, examples))
    levels = list(plan["weights"].values())
    exact = (place / "all" / "fp32" / "weights.bin").stat().st_size
    return {
        "weights": {level: levels.count(level) for level in sorted(set(levels))},
        "of_fp32": round((found.path / "weights.bin").stat().st_size / exact, 3),
        "search": plan["search"],
        "held_out": compare_answers(task, both[0], both[1], right_answers(task, examples)),
    }


def _write(path: Path, task: Task, rows: Iterable[Row]) -> Path:
    """Write rows as a file of labelled examples."""
    (field,) = task.fields
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            label = row.label if task.kind == "regression" else task.labels[int(row.label)]
            file.write(json.dumps({field: row.text, "label": label}) + "\n")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precisions", description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, default=Path("~/.cache/eptc-examples"), help="cache of the packages")
    add("--folder", type=Path, default=ROOT / "build" / "precisions", help="for the engines")
    add("--results", type=Path, default=RESULTS, help="for the results")
    return parser


if __name__ == "__main__":
    main()
