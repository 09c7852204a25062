"""SpecializeRouter: gates become numbers, the task's head becomes the head."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eptc.errors import InternalError
from eptc.ir import AdaptedModel, Constant, Routed, TokenRouter
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


def test_what_a_routed_gate_makes_of_the_task_is_a_bias(routed: AdaptedModel) -> None:
    """The gates stay routed, those of the one task, and all branches share one router."""
    before = routed.adapters["b"].input_router
    assert isinstance(before, TokenRouter)
    assert before.embedding is not None
    with pytest.raises(InternalError, match="without a task"):
        before.gates(np.ones((1, 1, 9)))
    for task_id in (0, 1):
        after = SpecializeRouter(task_id).rewrite(routed)
        after.validate()
        router = after.adapters["b"].input_router
        assert isinstance(router, TokenRouter)
        assert not router.reads_task
        gates = [b.gate for b in after.adapters["b"].branches]
        assert all(isinstance(g, Routed) and g.router is router for g in gates)
        x = np.random.default_rng(2).standard_normal((2, 3, 9))
        alone = dataclasses.replace(router, bias=None)
        moved = x + before.embedding.numpy()[task_id].astype(np.float64)
        np.testing.assert_allclose(router.gates(x), alone.gates(moved), rtol=0, atol=1e-12)


def test_linears_of_one_router_share_the_next_one(routed: AdaptedModel) -> None:
    adapter = routed.adapters["b"]
    twin = dataclasses.replace(adapter, target="c")
    model = routed.replace(
        weights={**routed.weights, "c.weight": routed.weights["b.weight"]},
        adapters={**routed.adapters, "c": twin},
    )
    after = SpecializeRouter(0).rewrite(model)
    assert after.adapters["b"].input_router is after.adapters["c"].input_router


def test_a_gate_that_still_reads_the_task_is_found(routed: AdaptedModel) -> None:
    with pytest.raises(InternalError, match="Routed gate left that reads the task"):
        routed.replace(task_id=0, adapters={"b": routed.adapters["b"]}).validate()
