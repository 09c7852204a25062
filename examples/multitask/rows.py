"""Rows of labelled text and their split into training and held-out rows."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from eptc.tasks import Task

__all__ = ["Dataset", "Row", "key", "split"]

SPLIT_SEED = 20260313
HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Row:
    """One labelled text.

    Args:
        text: the text as the task's field.
        label: index into the task's labels, or the rating of a regression.
        group: rows that belong together (a mail thread, a template) share it and are never
            divided between training and test.
        stratum: the split is made within each stratum; a stratum of one group is training only.
    """

    text: str
    label: float
    group: str = ""
    stratum: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A task with its training and held-out rows."""

    task: Task
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


def key(text: str) -> str:
    """Return what two texts share that a reader would call the same.

    >>> key("  Great   PHONE!! ") == key("great phone")
    True
    """
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def split(task: Task, rows: Iterable[Row], seed: int = SPLIT_SEED) -> Dataset:
    """Divide rows by group, the same way on every machine.

    The first row of each text is kept; a classification text that occurs with two labels is
    dropped altogether, as no split of it can be fair.
    """
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in _distinct(rows, ambiguous_dropped=task.kind == "classification"):
        groups.setdefault(row.stratum, {}).setdefault(row.group or key(row.text), []).append(row)
    train: list[Row] = []
    held_out: list[Row] = []
    rng = random.Random(seed)
    for stratum in sorted(groups):
        names = sorted(groups[stratum])
        rng.shuffle(names)
        held = _held_out(names, groups[stratum])
        for name in names:
            (held_out if name in held else train).extend(groups[stratum][name])
    return Dataset(task, tuple(train), tuple(held_out))


def _distinct(rows: Iterable[Row], *, ambiguous_dropped: bool) -> list[Row]:
    first: dict[str, Row] = {}
    ambiguous: set[str] = set()
    for row in rows:
        if not row.text.strip():
            continue
        seen = first.setdefault(key(row.text), row)
        if seen.label != row.label:
            ambiguous.add(key(row.text))
    return [row for name, row in first.items() if not (ambiguous_dropped and name in ambiguous)]


def _held_out(names: Sequence[str], groups: dict[str, list[Row]]) -> set[str]:
    """Return the first groups that together hold the share of the rows; never all of them."""
    wanted = HELD_OUT * sum(map(len, groups.values()))
    held: set[str] = set()
    for name in names[:-1]:
        if wanted <= 0:
            break
        held.add(name)
        wanted -= len(groups[name])
    return held
