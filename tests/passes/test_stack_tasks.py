"""StackTasks: each task's branches as one low rank of its own, chosen by the task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eptc.errors import InternalError, ParityError
from eptc.ir import AdaptedModel, Constant, LowRank, OfTask
from eptc.linear_probe import LinearProbe
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.passes.specialize_router import SpecializeRouter
from eptc.passes.stack_tasks import StackTasks
from eptc.run_passes import run_adapter_passes


@pytest.mark.parametrize("path", ["a", "b"])
@pytest.mark.parametrize("chosen", [(0, 1), (1, 0), (1,)])
def test_each_task_adds_what_it_did(
    model: AdaptedModel, path: str, chosen: tuple[int, ...]
) -> None:
    stacked = StackTasks(chosen, "float64").rewrite(model)
    stacked.validate()
    adapter = stacked.adapters[path]
    assert [branch.gate for branch in adapter.branches] == [OfTask(t) for t in chosen]
    for task_id in chosen:
        want = model.adapters[path].delta(task_id)
        np.testing.assert_allclose(adapter.delta(task_id), want, atol=1e-13)
        (low,) = [b.delta for b in adapter.branches if b.gate == OfTask(task_id)]
        assert isinstance(low, LowRank)
        assert low.A.shape[0] == np.linalg.matrix_rank(want)


def test_a_task_that_was_not_chosen_adds_nothing(model: AdaptedModel) -> None:
    adapter = StackTasks((1,)).rewrite(model).adapters["a"]
    assert not adapter.delta(0).any()
    with pytest.raises(InternalError, match="without a task"):
        adapter.delta(None)


def test_a_task_whose_branches_cancel_gets_none(model: AdaptedModel) -> None:
    first = model.adapters["a"].branches[0]
    cancelled = tuple(dataclasses.replace(first, gate=Constant(factor)) for factor in (1.0, -1.0))
    adapters = {"a": dataclasses.replace(model.adapters["a"], branches=cancelled)}
    assert (
        StackTasks((0, 1)).rewrite(model.replace(adapters=adapters)).adapters["a"].branches == ()
    )


def test_twice_is_once_and_folding_leaves_it_alone(model: AdaptedModel) -> None:
    stacked = StackTasks((0, 1)).rewrite(model)
    assert StackTasks((0, 1)).rewrite(stacked) is stacked
    assert FoldPyramid().rewrite(stacked) is stacked


def test_a_model_of_one_task_is_left_alone(model: AdaptedModel) -> None:
    fixed = SpecializeRouter(1).rewrite(model)
    assert StackTasks((0, 1)).rewrite(fixed) is fixed


def test_a_gate_that_reads_the_input_is_left_alone(routed: AdaptedModel) -> None:
    found = StackTasks((0, 1)).rewrite(routed)
    assert found.adapters["b"] is routed.adapters["b"]


@pytest.mark.parametrize("task_id", [0, 1])
def test_the_pipeline_measures_each_task(model: AdaptedModel, task_id: int) -> None:
    _, (record,) = run_adapter_passes(
        model, [StackTasks((0, 1))], task_id=task_id, probe=LinearProbe()
    )
    assert record.error is not None
    assert 0 < record.error <= 1
    with pytest.raises(ParityError, match="stack-tasks is exact"):
        run_adapter_passes(
            model, [StackTasks((1 - task_id,))], task_id=task_id, probe=LinearProbe()
        )
