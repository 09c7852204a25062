"""Answers on labelled data: paired, and over a budget or not."""

from __future__ import annotations

import numpy as np
import pytest

from eptc.errors import ParityError
from eptc.parity_gate import Answers, Budget, compare_answers
from eptc.tasks import Task

TASK = Task("t", "classification", labels=("no", "yes"))
VALUE = Task("v", "regression")


def of(margins: list[float]) -> Answers:
    """Answers that lead by these margins to the second label."""
    scores = np.array([[-m / 2, m / 2] for m in margins])
    return Answers([int(m > 0) for m in margins], scores)


def test_equal_answers() -> None:
    """Nothing is lost, and nothing is claimed of few rows."""
    same = of([1.0, -2.0, 3.0])
    found = compare_answers(TASK, same, same, [1, 0, 0])
    assert (found["drop"], found["flips"], found["error"]) == (0, 0, 0)
    assert (found["engine"], found["cosine"], found["claimed"]) == (0.6667, 1, False)
    assert found["drop_interval"] == [0, 0]


def test_flips_where_the_reference_is_sure() -> None:
    """A flip counts beyond noise where the margin is above twice the usual error."""
    want = of([0.01] * 10 + [9.0] * 90)
    near = of([-0.01] + [0.03] * 9 + [9.02] * 90)
    found = compare_answers(TASK, want, near, [1] * 100)
    assert (found["flips"], found["flips_beyond_noise"]) == (1, 0)
    assert found["drop"] == 0.01
    far = of([0.01] * 10 + [9.0] * 89 + [-9.0])
    found = compare_answers(TASK, want, far, [1] * 100)
    assert (found["flips"], found["flips_beyond_noise"]) == (1, 1)


def test_an_engine_that_is_always_wrong() -> None:
    """Its own error does not make the reference unsure."""
    want, got = of([10.0, -10.0] * 500), of([-10.0] * 1000)
    found = compare_answers(TASK, want, got, [1, 0] * 500)
    assert (found["flips"], found["flips_beyond_noise"]) == (500, 500)
    assert "500 of 1000 labels change" in str(Budget().exceeded(found))


def test_nobody_is_sure_of_what_rounding_moves() -> None:
    """However small the error is; more so where weights are stored in 16 bits."""
    want = of([1e-5] + [0.01] * 9 + [9.0] * 90)
    got = of([-1e-5] + [-0.01] + [0.01] * 8 + [9.0] * 90)
    for precision, flips in (("fp32", 1), ("int8", 1), ("fp16-weights", 1), ("bf16-weights", 0)):
        found = compare_answers(TASK, want, got, [1] * 100, precision=precision)
        assert (found["flips"], found["flips_beyond_noise"]) == (2, flips)


def test_interval_holds_the_drop() -> None:
    """Thirty flips the wrong way out of a thousand: three points, give or take one."""
    want, got = of([1.0] * 1000), of([-1.0] * 30 + [1.0] * 970)
    found = compare_answers(TASK, want, got, [1] * 1000)
    low, high = found["drop_interval"]
    assert found["drop"] == 0.03
    assert 0.015 < low < 0.03 < high < 0.045
    assert found["claimed"]


def test_values() -> None:
    """A regression has no flips; its score is a correlation."""
    want = Answers([1.0, 2.0, 3.0], np.array([[1.0], [2.0], [3.0]]))
    got = Answers([3.0, 2.0, 1.0], np.array([[3.0], [2.0], [1.0]]))
    found = compare_answers(VALUE, want, got, [1.0, 2.0, 3.0])
    assert (found["metric"], found["drop"], found["flips"]) == ("pearson", 2.0, 0)


def test_budget() -> None:
    """Points lost and labels changed are counted apart; equal to the budget is within it."""
    want, got = of([1.0] * 200), of([-1.0] * 3 + [1.0] * 197)
    scores = compare_answers(TASK, want, got, [1] * 200)
    assert scores["drop"] == 0.015
    assert Budget(max_drop=1.5, max_flips=None).exceeded(scores) is None
    assert "drops by 1.50 points" in str(Budget(max_drop=1.4, max_flips=None).exceeded(scores))
    assert Budget(max_flips=0.015).exceeded(scores) is None
    assert "3 of 200 labels" in str(Budget(max_flips=0.01).exceeded(scores))
    with pytest.raises(ParityError, match="int4: the accuracy drops"):
        Budget(max_drop=0.0).check(scores, "int4")
