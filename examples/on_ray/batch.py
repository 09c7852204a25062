"""Label a large file on a Ray cluster: an engine in each worker, every row exactly once.

    python examples/on_ray/batch.py BUNDLE rows.jsonl labelled/ --workers 4

Ray starts a worker that dies again and gives its rows to another; what was written stays.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import ray.data

from eptc.runtime import Engine


class Classify:
    """A worker of `map_batches`: loads the engine once, answers batch after batch."""

    def __init__(self, bundle: str) -> None:
        self._engine = Engine.load(bundle)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add `label` and `probability`, or `value`, to rows with `text`."""
        answers = self._engine.classify([str(text) for text in batch["text"]], truncate=True)
        if answers[0].value is not None:  # a regression
            return {**batch, "value": [answer.value for answer in answers]}
        sure = [max(answer.probabilities or ()) for answer in answers]
        return {**batch, "label": [answer.label for answer in answers], "probability": sure}


def label(bundle: str, rows: str, out: str, *, workers: int = 2, batch_size: int = 64) -> None:
    """Read JSON lines, add what the engine answers, write JSON lines.

    Args:
        bundle: folder of the engine; every machine sees it under this path.
        rows: JSON lines with `text`, a file or a folder of them.
        out: folder for the result, likewise on all machines; there must be none yet.
        workers: engines at work, a CPU each.
        batch_size: rows an engine gets at once.
    """
    # Rows come in blocks; a block is what is read, answered and, after a failure, done again.
    data = ray.data.read_json(rows, lines=True).repartition(8 * workers)
    data.map_batches(
        Classify,
        fn_constructor_args=(bundle,),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        batch_size=batch_size,
    ).write_json(out, mode=ray.data.SaveMode.ERROR)  # never beside what another run left


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Label a large file on a Ray cluster.")
    parser.add_argument("bundle")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    ray.init(log_to_driver=False)  # RAY_ADDRESS names a cluster; without it: this machine
    paths = [os.path.abspath(path) for path in (given.bundle, given.rows, given.out)]  # noqa: PTH100
    label(*paths, workers=given.workers)


if __name__ == "__main__":
    main()
