"""Metrics of a task, for both sides of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eptc.tasks import Task

__all__ = ["score"]


def score(task: Task, answers: Sequence[Any], labels: Sequence[Any]) -> tuple[str, float]:
    """Return the metric's name and value.

    Regression: Pearson correlation. A task whose metric is `matthews`: Matthews correlation (the
    phi coefficient for more than two classes). Any other: accuracy. An answer of None is wrong.

    Args:
        task: the task.
        answers: label indices or values.
        labels: the right ones.
    """
    if task.kind == "regression":
        return "pearson", _correlation(np.array(answers, float), np.array(labels, float))
    if task.metric == "matthews":
        return "matthews", _matthews([-1 if a is None else a for a in answers], labels)
    right = [answer == label for answer, label in zip(answers, labels, strict=True)]
    return "accuracy", float(np.mean(right))


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
