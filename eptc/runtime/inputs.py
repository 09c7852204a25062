"""From what a caller gives to the strings the tokenizer gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eptc.errors import InputError, OptionError, TaskError
from eptc.tasks import Task, fill

__all__ = ["Example", "listed", "positive", "prepare"]

Example = str | Sequence[str] | Mapping[str, Any]


def listed(texts: Iterable[Any]) -> list[Any]:
    """Return the texts as a list.

    Raises:
        InputError: one text alone, or nothing that can be listed.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(
            f"the texts are {_short(texts)}",
            expected="a list of texts",
            fix="for one text, give a list of one: [text]",
        )
    return list(texts)


def prepare(
    texts: Iterable[Example], task: Task | Sequence[Task | None] | None
) -> list[tuple[str, ...]]:
    """Return one text or text pair per example, its task's prompt applied.

    Args:
        texts: a list of examples; each a string, a pair, or a dict by its task's field names.
        task: the task of all, or of each; None for plain text.

    Raises:
        InputError: not a list, or an example that is none of these; it is named by position.
    """
    given = listed(texts)
    tasks = [task] * len(given) if task is None or isinstance(task, Task) else task
    return [
        _one(i, example, own) for i, (example, own) in enumerate(zip(given, tasks, strict=True))
    ]


def positive(name: str, value: int) -> int:
    """Return an option's value; raises OptionError where it is no integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} is {value!r}", expected="an integer, 1 or more")
    return value


def _one(position: int, example: object, task: Task | None) -> tuple[str, ...]:
    if not isinstance(example, str | tuple | list | Mapping):
        raise InputError(
            f"text {position} is {_short(example)}",
            expected="a string, a pair of strings, or a dict by the task's field names",
        )
    try:
        filled = fill(task, example)
    except TaskError as error:
        raise TaskError(
            f"text {position}: {error.found}", expected=error.expected, fix=error.fix
        ) from error
    for text in filled:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text {position} is not valid Unicode: {error.reason}") from error
    return filled


def _short(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
