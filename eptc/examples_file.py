"""Examples in JSON lines: one object a line with the task's fields and, maybe, a label."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc.errors import InputError
from eptc.tasks import Task, fill, resolve

__all__ = ["Example", "read_examples", "read_task_examples"]

Example = Mapping[str, Any]


# A value beyond this is a mistake; squares of smaller ones can be summed.
_LARGEST = 1e30


def read_examples(
    path: Path, task: Task | None, *, labelled: bool | None = False
) -> list[Example]:
    """Return the examples of a JSON lines file.

    Args:
        path: one JSON object a line, with the task's fields and, maybe, `label`.
        task: whose fields they must have.
        labelled: whether each must have a label of the task; None: it may, False: labels are
            not looked at.

    Raises:
        InputError: the file cannot be read, is empty, or a line is not such an object.
    """
    fields = task.fields if task is not None else ("text",)
    expected = "a JSON object with the fields " + ", ".join(fields)
    return [example for _, example in _checked(path, lambda _: task, expected, labelled)]


def read_task_examples(
    path: Path, tasks: Sequence[Task], *, labelled: bool = False
) -> dict[str, list[Example]]:
    """Return the examples of a JSON lines file of several tasks, by the name of their task.

    Args:
        path: one JSON object a line, with the fields of its task, the task's name, an alias or
            its place among them in `task`, and, maybe, `label`.
        tasks: the tasks.
        labelled: whether each must have a label of its task.

    Raises:
        InputError: the file cannot be read, is empty, or a line is not such an object.
    """
    found: dict[str, list[Example]] = {}

    def named(example: Example) -> Task:
        if "task" not in example:
            raise InputError("it names no task")
        name = example["task"]
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise InputError(f"its task is {name!r}")
        return tasks[resolve(name, tasks)]

    names = ", ".join(task.name for task in tasks)
    expected = f"a JSON object with the fields of its task, and in `task` one of {names}"
    for task, example in _checked(path, named, expected, labelled):
        assert task is not None
        own = {key: value for key, value in example.items() if key != "task"}
        found.setdefault(task.name, []).append(own)
    return {task.name: found[task.name] for task in tasks if task.name in found}


def _checked(
    path: Path,
    task_of: Callable[[Example], Task | None],
    expected: str,
    labelled: bool | None,
) -> list[tuple[Task | None, Example]]:
    """Return each example and its task."""
    try:
        # Not splitlines(): JSON may have other separators (U+2028) inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    examples: list[tuple[Task | None, Example]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            if not isinstance(example, dict):
                raise InputError(f"it is a {type(example).__name__}, not an object")
            task = task_of(example)
            fill(task, example)
        except (ValueError, InputError) as error:
            reason = error.found if isinstance(error, InputError) else str(error)
            raise InputError(f"{path}, line {number}: {reason}", expected=expected) from error
        if labelled or (labelled is None and example.get("label") is not None):
            _check_label(path, number, example, task)
        examples.append((task, example))
    if not examples:
        raise InputError(f"{path} has no examples", expected="one JSON object a line")
    return examples


def _check_label(path: Path, number: int, example: Example, task: Task | None) -> None:
    label = example.get("label")
    if task is not None and task.kind == "regression":
        # NaN is not below anything.
        sound = (
            isinstance(label, int | float)
            and not isinstance(label, bool)
            and abs(label) < _LARGEST
        )
        expected = "a finite number"
    else:
        labels = task.labels if task is not None else ()
        sound = isinstance(label, str) and (not labels or label in labels)
        expected = f"one of {', '.join(labels)}" if labels else "a string"
    if not sound:
        raise InputError(f"{path}, line {number}: the label is {label!r}", expected=expected)
