"""DropDeadExperts: what adds zero goes, what may add anything stays."""

from __future__ import annotations

import dataclasses

import numpy as np

from eptc.ir import AdaptedModel, Constant
from eptc.passes.drop_dead_experts import DropDeadExperts
from eptc.passes.specialize_router import SpecializeRouter


def test_drops_zero_gates(model: AdaptedModel) -> None:
    """top_k of the experts stay, and the linear adds up to the same."""
    fixed = SpecializeRouter(0).rewrite(model)
    dropped = DropDeadExperts().rewrite(fixed)
    for path, adapter in dropped.adapters.items():
        assert len(adapter.branches) == 2
        np.testing.assert_array_equal(adapter.delta(None), fixed.adapters[path].delta(None))


def test_leaves_routed_gates_alone(model: AdaptedModel) -> None:
    """A gate that depends on the task is nobody's zero."""
    assert DropDeadExperts().rewrite(model) is model


def test_leaves_small_gates_alone(model: AdaptedModel) -> None:
    """Only zero is zero."""
    adapter = model.adapters["a"]
    tiny = tuple(dataclasses.replace(b, gate=Constant(1e-300)) for b in adapter.branches)
    changed = model.replace(adapters={"a": dataclasses.replace(adapter, branches=tiny)})
    assert DropDeadExperts().rewrite(changed) is changed


def test_second_run_changes_nothing(model: AdaptedModel) -> None:
    """There is nothing left to drop."""
    dropped = DropDeadExperts().rewrite(SpecializeRouter(0).rewrite(model))
    assert DropDeadExperts().rewrite(dropped) is dropped
