"""SpecializeRouter: gates become numbers, the task's head becomes the head."""

from __future__ import annotations

import numpy as np
import pytest

from eptc.ir import AdaptedModel, Constant
from eptc.passes.specialize_router import SpecializeRouter


@pytest.mark.parametrize("task_id", [0, 1])
def test_gates_become_the_route(model: AdaptedModel, task_id: int) -> None:
    """Each gate is the router's weight for its expert, zero for those it did not choose."""
    fixed = SpecializeRouter(task_id).rewrite(model)
    for path, before in model.adapters.items():
        assert before.router is not None
        route = before.router.route(task_id)
        weights = dict(zip(route.experts, route.weights, strict=True))
        gates = [branch.gate for branch in fixed.adapters[path].branches]
        assert gates == [Constant(weights.get(e, 0.0)) for e in range(len(gates))]
        np.testing.assert_array_equal(fixed.adapters[path].delta(None), before.delta(task_id))
    fixed.validate()


def test_tasks_differ(model: AdaptedModel) -> None:
    """The neighbour's gates are not this task's."""
    first, second = (SpecializeRouter(i).rewrite(model).adapters["a"] for i in (0, 1))
    assert [b.gate for b in first.branches] != [b.gate for b in second.branches]


def test_head_replaces_the_base(model: AdaptedModel) -> None:
    """The task with a head brings its weight and labels; the other keeps the base's."""
    first, second = (SpecializeRouter(i).rewrite(model) for i in (0, 1))
    assert first.weights["head.weight"].shape == (2, 10)
    assert first.config["id2label"] == {"0": "no", "1": "yes"}
    assert second.weights["head.weight"] is model.weights["head.weight"]
    assert "id2label" not in second.config
    assert not first.heads


def test_second_run_changes_nothing(model: AdaptedModel) -> None:
    """A specialised model comes back as it is."""
    fixed = SpecializeRouter(0).rewrite(model)
    assert SpecializeRouter(0).rewrite(fixed) is fixed
