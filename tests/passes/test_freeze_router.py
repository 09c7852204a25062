"""FreezeRouter: gates that read the input become numbers, all others stay."""

from __future__ import annotations

import numpy as np
import pytest

from eptc.errors import InternalError
from eptc.ir import AdaptedModel, Constant
from eptc.ir.numbers import read
from eptc.passes.freeze_router import FreezeRouter
from eptc.passes.specialize_router import SpecializeRouter
from eptc.pipeline import freezing_passes
from eptc.run_passes import run_adapter_passes

GATES = {"b": [0.625, 0.0, 0.375]}
SPREAD = {"b": [0.125, 0.0, 0.125]}


def test_gates_become_their_means(routed: AdaptedModel) -> None:
    fixed = SpecializeRouter(1).rewrite(routed)
    frozen = FreezeRouter(GATES, SPREAD).rewrite(fixed)
    found = [branch.gate for branch in frozen.adapters["b"].branches]
    assert found == [Constant(0.625), Constant(0.0), Constant(0.375)]
    assert frozen.adapters["a"] is fixed.adapters["a"]
    assert [b.scale for b in frozen.adapters["b"].branches] == [2.0] * 3


def test_folds_like_any_constant_gate(routed: AdaptedModel) -> None:
    """The weight is the base's plus the mean mixture; the dead expert is dropped before."""
    fixed = SpecializeRouter(1).rewrite(routed)
    passes = freezing_passes(GATES, SPREAD)
    frozen, _ = run_adapter_passes(fixed, passes[:1], task_id=1, probe=None)
    folded, _ = run_adapter_passes(frozen, passes[1:], task_id=1, probe=None)
    deltas = [branch.delta.dense() for branch in routed.adapters["b"].branches]
    base, found = (read(m.weights["b.weight"]) for m in (routed, folded))
    want = base + 2.0 * (0.625 * deltas[0] + 0.375 * deltas[2])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    assert not folded.adapters["b"].branches


def test_leaves_a_model_alone_that_routes_by_task(model: AdaptedModel) -> None:
    assert FreezeRouter({}, {}).rewrite(model) is model


def test_every_routed_linear_needs_its_gates(routed: AdaptedModel) -> None:
    with pytest.raises(InternalError, match="no mean gates for b"):
        FreezeRouter({"a": [1.0]}, {}).rewrite(routed)


def test_second_run_changes_nothing(routed: AdaptedModel) -> None:
    step = FreezeRouter(GATES, SPREAD)
    frozen = step.rewrite(SpecializeRouter(1).rewrite(routed))
    assert step.rewrite(frozen) is frozen
