"""FoldPyramid: the sum is formed in float64, rounded once, and only when it is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eptc.errors import CheckpointError
from eptc.ir import AdaptedModel, Delta
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.passes.specialize_router import SpecializeRouter


@pytest.fixture
def fixed(model: AdaptedModel) -> AdaptedModel:
    return SpecializeRouter(0).rewrite(model)


@pytest.mark.parametrize("path", ["a", "b"])
def test_folds_with_one_rounding(fixed: AdaptedModel, path: str) -> None:
    """The weight is the float64 sum to half a unit in the last place."""
    folded = FoldPyramid().rewrite(fixed)
    base = fixed.weights[f"{path}.weight"].numpy().astype(np.float64)
    exact = base + fixed.adapters[path].delta(None)
    got = folded.weights[f"{path}.weight"].numpy()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    assert np.abs(exact - base).max() > 0.1  # the experts are no rounding error here
    assert not folded.adapters[path].branches
    folded.validate()


def test_other_weights_are_the_same_objects(fixed: AdaptedModel) -> None:
    """Nothing that has no adapter is touched."""
    folded = FoldPyramid().rewrite(fixed)
    for name in ("head.weight", "norm.weight"):
        assert folded.weights[name] is fixed.weights[name]


def test_reads_nothing_before_it_is_asked(
    fixed: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folding is a promise: no expert is computed while the pass runs."""

    def refuse(_: Delta) -> None:
        raise AssertionError("computed too early")

    for family in {type(b.delta) for a in fixed.adapters.values() for b in a.branches}:
        monkeypatch.setattr(family, "reader", refuse)
    folded = FoldPyramid().rewrite(fixed)
    with pytest.raises(AssertionError, match="too early"):
        folded.weights["a.weight"].numpy()


def test_leaves_routed_adapters_alone(model: AdaptedModel) -> None:
    """A gate that depends on the task cannot be folded."""
    assert FoldPyramid().rewrite(model) is model
    half = SpecializeRouter(0).rewrite(model).adapters["a"]
    mixed = model.replace(adapters={**model.adapters, "a": half})
    folded = FoldPyramid().rewrite(mixed)
    assert not folded.adapters["a"].branches
    assert folded.adapters["b"] is model.adapters["b"]
    assert folded.weights["b.weight"] is model.weights["b.weight"]


def test_second_run_changes_nothing(fixed: AdaptedModel) -> None:
    """Nothing is left to fold."""
    folded = FoldPyramid().rewrite(fixed)
    assert FoldPyramid().rewrite(folded) is folded


def test_an_overflow_is_refused(fixed: AdaptedModel) -> None:
    """An infinite weight is never written."""
    adapter = fixed.adapters["a"]
    huge = tuple(dataclasses.replace(b, scale=1e39) for b in adapter.branches)
    changed = fixed.replace(adapters={"a": dataclasses.replace(adapter, branches=huge)})
    with pytest.raises(CheckpointError, match="experts of a into its weight overflows float32"):
        FoldPyramid().rewrite(changed).weights["a.weight"].numpy()


def test_scale_counts(fixed: AdaptedModel) -> None:
    """Twice the scale is twice the change."""
    adapter = fixed.adapters["a"]
    twice = tuple(dataclasses.replace(b, scale=2 * b.scale) for b in adapter.branches)
    other = fixed.replace(
        adapters={**fixed.adapters, "a": dataclasses.replace(adapter, branches=twice)}
    )
    base = fixed.weights["a.weight"].numpy().astype(np.float64)
    once, doubled = (
        FoldPyramid().rewrite(m).weights["a.weight"].numpy().astype(np.float64) - base
        for m in (fixed, other)
    )
    np.testing.assert_allclose(doubled, 2 * once, rtol=0, atol=1e-4)
