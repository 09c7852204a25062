"""TruncateRank: the nearest matrix of a smaller rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eptc.errors import CheckpointError
from eptc.ir import AdaptedModel, Adapter, Branch, Constant, LowRank
from eptc.linear_probe import LinearProbe
from eptc.passes.factor_pyramid import FactorPyramid
from eptc.passes.specialize_router import SpecializeRouter
from eptc.passes.truncate_rank import TruncateRank
from eptc.run_passes import run_adapter_passes
from eptc.tensors import ArrayTensor


@pytest.fixture
def low() -> AdaptedModel:
    """One linear [12, 8] with a branch of rank 5."""
    rng = np.random.default_rng(0)
    a, b, w = (
        ArrayTensor(n, rng.standard_normal(shape).astype(np.float32))
        for n, shape in (("A", (5, 8)), ("B", (12, 5)), ("W", (12, 8)))
    )
    branch = Branch(LowRank(a, b, 12, 8), Constant(0.5), 4.0)
    return AdaptedModel({}, {"a.weight": w}, {"a": Adapter("a", (branch,))}, {}, ())


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_it_is_the_nearest(low: AdaptedModel, rank: int) -> None:
    """The error is what the singular values left out carry; no matrix of that rank is nearer."""
    want = low.adapters["a"].delta(None)
    found = TruncateRank(rank, "float64").rewrite(low).adapters["a"].delta(None)
    assert np.linalg.matrix_rank(found) == rank
    left_out = np.linalg.svd(want, compute_uv=False)[rank:]
    assert np.linalg.norm(found - want) == pytest.approx(np.linalg.norm(left_out), rel=1e-10)


def test_smaller_ranks_are_left_alone(low: AdaptedModel) -> None:
    assert TruncateRank(5).rewrite(low) is low
    assert TruncateRank(9).rewrite(low) is low


def test_pyramids_are_factored_first(model: AdaptedModel) -> None:
    fixed = SpecializeRouter(0).rewrite(model)
    assert TruncateRank(1).rewrite(fixed) is fixed
    factored = FactorPyramid().rewrite(fixed)
    truncated = TruncateRank(1).rewrite(factored)
    truncated.validate()
    ranks = {b.delta.tensors[0].shape[0] for a in truncated.adapters.values() for b in a.branches}
    assert ranks == {1}


def test_the_pipeline_measures_what_is_lost(low: AdaptedModel) -> None:
    _, (record,) = run_adapter_passes(low, [TruncateRank(2)], task_id=0, probe=LinearProbe())
    assert record.contract == "lossy"
    assert record.error is not None
    assert record.error > 1.0


def test_factors_that_overflow_are_refused(low: AdaptedModel) -> None:
    """The low rank itself may be float64."""
    adapter = low.adapters["a"]
    (branch,) = adapter.branches
    huge = dataclasses.replace(adapter, branches=(dataclasses.replace(branch, scale=1e90),))
    delta = TruncateRank(2).rewrite(low.replace(adapters={"a": huge})).adapters["a"].branches[0]
    with pytest.raises(CheckpointError, match="experts of a add, its rank cut, overflows float32"):
        delta.delta.factors()
