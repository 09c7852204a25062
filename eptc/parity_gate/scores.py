"""Metrics of a task, for both sides of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eptc.tasks import Task

__all__ = ["score"]


def score(task: Task, answers: Sequence[Any], labels: Sequence[Any]) -> tuple[str, float]:
    """Return the metric's name and value.

    Regression, and a text-to-text task whose metric is `pearson` (its labels are numbers):
    Pearson correlation. A task whose metric is `matthews`: Matthews correlation (the phi
    coefficient for more than two classes). Any other: accuracy. An answer of None is wrong: as a
    number it is the one furthest from the right one.

    Args:
        task: the task.
        answers: label indices or values.
        labels: the right ones.
    """
    if task.kind == "regression":
        return "pearson", _correlation(np.array(answers, float), np.array(labels, float))
    if task.metric == "pearson" and all(map(_is_number, task.labels)):
        values = [float(label) for label in task.labels]
        right = [values[label] for label in labels]
        low, high = min(values), max(values)
        got = [
            values[a] if a is not None else (low if r - low > high - r else high)
            for a, r in zip(answers, right, strict=True)
        ]
        return "pearson", _correlation(np.array(got), np.array(right))
    if task.metric == "matthews":
        return "matthews", _matthews([-1 if a is None else a for a in answers], labels)
    hits = [answer == label for answer, label in zip(answers, labels, strict=True)]
    return "accuracy", float(np.mean(hits))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def _matthews(answers: Sequence[int], labels: Sequence[int]) -> float:
    """R_K of Gorodkin (2004): the correlation of both one-hot matrices."""
    classes = sorted({*answers, *labels})
    x = np.equal.outer(np.array(answers), classes).astype(float)
    y = np.equal.outer(np.array(labels), classes).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0
