"""Metrics against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from eptc.parity_gate.scores import score
from eptc.tasks import GLUE, Task

COLA, RTE, STSB = GLUE["cola"], GLUE["rte"], GLUE["stsb"]
CLASSES = Task("three", "classification", labels=("a", "b", "c"), metric="matthews")
VALUE = Task("value", "regression")


@pytest.mark.parametrize(
    ("task", "answers", "labels", "name", "value"),
    [
        (RTE, [0, 1, 1, 0], [0, 1, 0, 0], "accuracy", 0.75),
        (RTE, [None, 1], [0, 1], "accuracy", 0.5),
        # tp 6, tn 3, fp 1, fn 2: (6 3 - 1 2) / sqrt(7 8 4 5)
        (
            COLA,
            [1] * 6 + [0] * 3 + [1] + [0] * 2,
            [1] * 6 + [0] * 3 + [0] + [1] * 2,
            "matthews",
            16 / 1120**0.5,
        ),
        (COLA, [0, 1, 1], [0, 1, 1], "matthews", 1.0),
        (COLA, [1, 0, 0], [0, 1, 1], "matthews", -1.0),
        (COLA, [1, 1, 1], [0, 1, 1], "matthews", 0.0),
        # None is a class of its own that is never right.
        (COLA, [None, 1, 1], [0, 1, 1], "matthews", 0.5),
        # Confusion [[2, 0, 0], [1, 1, 0], [0, 0, 1]]: c 4, s 5, t (2, 2, 1), p (3, 1, 1).
        (CLASSES, [0, 0, 0, 1, 2], [0, 0, 1, 1, 2], "matthews", 11 / (14 * 16) ** 0.5),
        (VALUE, [1.0, 2.0, 3.0], [2.0, 4.0, 6.0], "pearson", 1.0),
        # Covariance 3, variances 5 and 2.75, over four values each.
        (VALUE, [1, 2, 3, 4], [1, 3, 2, 5], "pearson", 5.5 / (5 * 8.75) ** 0.5),
        (VALUE, [1.0, 1.0], [1.0, 2.0], "pearson", 0.0),
        # Labels "0.0", "0.2" ... "5.0".
        (STSB, [0, 5, 25], [0, 5, 25], "pearson", 1.0),
        (STSB, [0, 10, 25], [5, 15, 15], "pearson", 0.8029550685469661),
        # No number: the furthest, 5.0 for 0.2 and 0.0 for 4.0.
        (STSB, [None, 5, None], [1, 5, 20], "pearson", -8.4 / (14 * 8.026666666666667) ** 0.5),
    ],
)
def test_score(task: Task, answers: Any, labels: Any, name: str, value: float) -> None:
    found, result = score(task, answers, labels)
    assert found == name
    assert result == pytest.approx(value)
