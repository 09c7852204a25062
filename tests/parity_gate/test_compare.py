"""The comparison of two arrays: what passes, what never does, what it says."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from eptc.parity_gate.compare import FP32, Bound, compare, not_run

LOOSE = Bound(0.1, 1.0, "a test")


def array(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", ["engine", "reference", "both"])
def test_what_is_not_finite_never_passes(bad: float, sides: str) -> None:
    """Not even where both sides have the same infinity, or the bound is infinite."""
    got, want = array(1, 2, 3), array(1, 2, 3)
    if sides != "reference":
        got[1] = bad
    if sides != "engine":
        want[1] = bad
    for bound in (FP32, LOOSE, Bound(1e300, 1.0, "anything goes")):
        result = compare("x", got, want, bound)
        assert not result.passed
        assert result.worst == (1,)
        assert math.isinf(result.error)
        assert math.isfinite(result.bound)
        json.dumps(result.to_json(), allow_nan=False)


def test_nan_of_the_reference_does_not_widen_the_bound() -> None:
    assert compare("x", array(1, 1), array(1, math.inf), LOOSE).bound == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros((2, 3)), np.zeros((2, 3, 1))),
        (np.zeros((1, 3)), np.zeros((2, 3))),
        (np.zeros((0, 3)), np.zeros((2, 3))),
    ],
)
def test_shapes_must_be_equal(got: Any, want: Any) -> None:
    """Nothing is broadcast."""
    result = compare("logits", got, want, LOOSE)
    assert not result.passed
    assert result.shape == got.shape
    assert result.explain() == (
        f"logits: shape {list(got.shape)}, the reference has {list(want.shape)}"
    )


def test_bound_is_a_part_of_the_largest_element() -> None:
    want = array(0, 0, -200)
    assert compare("x", array(19, 0, -200), want, LOOSE).passed
    assert not compare("x", array(21, 0, -200), want, LOOSE).passed


def test_bound_has_a_floor() -> None:
    want = array(0.001, 0.002)
    assert compare("x", array(0.1, 0.002), want, LOOSE).passed
    assert not compare("x", array(0.2, 0.002), want, LOOSE).passed


def test_error_on_the_bound_passes() -> None:
    result = compare("x", np.array([1.5]), np.array([1.0]), Bound(0.5, 1.0, "a test"))
    assert result.error == result.bound == 0.5
    assert result.passed


def test_worst_element() -> None:
    want = np.zeros((2, 3, 4), np.float32)
    got = want.copy()
    got[1, 2, 0], got[0, 0, 0] = -3, 2
    result = compare("logits, a batch", got, want, FP32)
    assert result.worst == (1, 2, 0)
    assert (result.got, result.want, result.error) == (-3, 0, 3)
    assert result.explain() == (
        "logits, a batch [2, 3, 4]: element [1, 2, 0] is -3, the reference has 0: off by 3, "
        "allowed 3e-05 (cosine nan)"
    )


def test_float32_is_compared_in_float64() -> None:
    a = np.float32(16777216)
    result = compare("x", np.array([a]), np.array([np.nextafter(a, np.float32(0))]), FP32)
    assert result.error == 1.0


def test_padding_does_not_count() -> None:
    want = np.ones((2, 3, 4), np.float32)
    got = want.copy()
    got[0, 2], got[1, 1:] = math.nan, 1e9
    where = np.array([[True, True, False], [True, False, False]])
    result = compare("state", got, want, FP32, where)
    assert result.passed
    assert result.error == 0
    got[1, 0, 3] = 1.5
    assert compare("state", got, want, FP32, where).worst == (1, 0, 3)


def test_padding_of_the_reference_does_not_widen_the_bound() -> None:
    want = np.array([[1.0, 1e9]])
    where = np.array([[True, False]])
    assert compare("x", np.array([[1.5, 0.0]]), want, LOOSE, where).bound == pytest.approx(0.1)


def test_cosine() -> None:
    assert compare("x", array(1, 2), array(2, 4), LOOSE).cosine == pytest.approx(1)
    assert compare("x", array(1, 0), array(0, 1), LOOSE).cosine == pytest.approx(0)
    assert compare("x", array(0, 0), array(0, 0), LOOSE).cosine == 1


def test_empty_arrays_agree() -> None:
    assert compare("cache", np.zeros((2, 0)), np.zeros((2, 0)), FP32).passed


def test_not_run() -> None:
    result = not_run("the engine does not run")
    assert not result.passed
    assert result.explain() == "the engine does not run"
    json.dumps(result.to_json(), allow_nan=False)
