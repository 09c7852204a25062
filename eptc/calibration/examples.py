"""The text that an engine is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eptc.errors import InputError
from eptc.examples_file import Example, read_examples
from eptc.runtime import Engine
from eptc.runtime.tokenizer import TextTooLongError
from eptc.tasks import Task

__all__ = ["FEW", "cut_rows", "read_calibration"]

# Below this many rows the largest numbers of a model are mostly not among those that were seen.
FEW = 100


def read_calibration(path: Path, task: Task | None) -> tuple[list[Example], tuple[str, ...]]:
    """Return the examples of a JSON lines file, and what a user should know about them.

    Labels may be missing; where a row has one it must be one of the task's.

    Args:
        path: one JSON object a line, with the task's fields and, maybe, `label`.
        task: the task that the engine is for; None for plain text.

    Raises:
        InputError: the file cannot be read, is empty, a line is not such an object, or every row
            has the same one of several labels.
    """
    examples = read_examples(path, task, labelled=None)
    labels = [example.get("label") for example in examples]
    several = task is not None and len(task.labels) > 1
    if several and labels[0] is not None and set(labels) == {labels[0]}:
        raise InputError(
            f"every row of {path} has the label {labels[0]!r}",
            expected="rows of several labels, as they come in use",
            fix="add rows of the other labels: what their texts do to the engine is not seen",
        )
    if len(examples) < FEW:
        note = f"{path} has {len(examples)} rows: calibrate on {FEW} or more"
        return examples, (note,)
    return examples, ()


def cut_rows(engine: Engine, examples: Sequence[Example]) -> int:
    """Return how many examples are longer than the engine takes.

    Calibration cuts them as training did: a file that is good otherwise should not fail for a
    few long rows, and what the engine computes in use is never longer.
    """
    count = 0
    for example in examples:
        try:
            engine.tokenize([example])
        except TextTooLongError:
            count += 1
    return count
