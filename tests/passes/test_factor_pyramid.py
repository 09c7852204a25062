"""FactorPyramid: one low rank beside each linear, the least there is, rounded once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from eptc.errors import ParityError
from eptc.ir import (
    AdaptedModel,
    Adapter,
    Branch,
    CellScaledLowRank,
    Constant,
    Delta,
    Kronecker,
    LowRank,
)
from eptc.linear_probe import LinearProbe
from eptc.passes.factor_pyramid import FactorPyramid
from eptc.passes.specialize_router import SpecializeRouter
from eptc.run_passes import run_adapter_passes
from eptc.tensors import Array, ArrayTensor


@pytest.fixture
def fixed(model: AdaptedModel) -> AdaptedModel:
    return SpecializeRouter(0).rewrite(model)


def _tensor(array: Any) -> ArrayTensor:
    return ArrayTensor("t", np.asarray(array, np.float32))


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _of(*deltas: Delta, gates: tuple[float, ...] | None = None) -> AdaptedModel:
    """A model of one linear [12, 8] with constant branches."""
    factors = gates or (1.0,) * len(deltas)
    branches = tuple(Branch(d, Constant(g), 0.5) for d, g in zip(deltas, factors, strict=True))
    weights = {"a.weight": _tensor(_random(12, 8, seed=9))}
    return AdaptedModel({}, weights, {"a": Adapter("a", branches)}, {}, ())


def _rank(model: AdaptedModel) -> int:
    (branch,) = model.adapters["a"].branches
    assert isinstance(branch.delta, LowRank)
    return branch.delta.A.shape[0]


@pytest.mark.parametrize("path", ["a", "b"])
def test_the_sum_is_the_same(fixed: AdaptedModel, path: str) -> None:
    factored = FactorPyramid("float64").rewrite(fixed)
    factored.validate()
    (branch,) = factored.adapters[path].branches
    want = fixed.adapters[path].delta(None)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(factored.adapters[path].delta(None), want, atol=1e-13)
    assert branch.delta.tensors[0].shape[0] == np.linalg.matrix_rank(want)


def test_factors_are_rounded_once(fixed: AdaptedModel) -> None:
    double, single = (FactorPyramid(d).rewrite(fixed) for d in ("float64", "float32"))
    for one, two in zip(
        double.adapters["a"].branches[0].delta.tensors,
        single.adapters["a"].branches[0].delta.tensors,
        strict=True,
    ):
        np.testing.assert_array_equal(one.numpy().astype(np.float32), two.numpy())


def test_experts_of_one_size_share_rows() -> None:
    a, b = _tensor(_random(2, 8)), _tensor(_random(12, 2, seed=1))
    cells = [_tensor(_random(6, 2, seed=s)) for s in (2, 3)]
    kernels = [_tensor(_random(2, 2, seed=s)) for s in (4, 5)]
    assert (
        _rank(FactorPyramid().rewrite(_of(*(CellScaledLowRank(a, b, k, 12, 8) for k in cells))))
        == 2
    )
    assert _rank(FactorPyramid().rewrite(_of(*(Kronecker(a, b, k, 12, 8) for k in kernels)))) == 4


def test_a_kernel_of_less_than_full_rank_takes_less() -> None:
    a, b = _tensor(_random(2, 8)), _tensor(_random(12, 2, seed=1))
    column, row = _random(2, 1, seed=2), _random(1, 2, seed=3)
    # A product of float32 is exact in float64 only where it is given so.
    kernel = ArrayTensor("k", column.astype(np.float64) @ row.astype(np.float64))
    model = _of(Kronecker(a, b, kernel, 12, 8))
    factored = FactorPyramid("float64").rewrite(model)
    assert _rank(factored) == 2
    want = model.adapters["a"].delta(None)
    np.testing.assert_allclose(factored.adapters["a"].delta(None), want, atol=1e-13)


def test_branches_that_cancel_leave_none() -> None:
    low = LowRank(_tensor(_random(3, 8)), _tensor(_random(12, 3, seed=1)), 12, 8)
    factored = FactorPyramid().rewrite(_of(low, low, gates=(1.0, -1.0)))
    assert factored.adapters["a"].branches == ()
    assert FactorPyramid().rewrite(_of(low, gates=(0.0,))).adapters["a"].branches == ()


def test_a_rank_that_is_too_large_is_cut() -> None:
    """Rank 20 of a matrix [12, 8] is at most 8."""
    low = LowRank(_tensor(_random(20, 8)), _tensor(_random(12, 20, seed=1)), 12, 8)
    assert _rank(FactorPyramid().rewrite(_of(low))) == 8


def test_one_plain_low_rank_is_left_alone(fixed: AdaptedModel) -> None:
    factored = FactorPyramid().rewrite(fixed)
    assert FactorPyramid().rewrite(factored) is factored


@pytest.mark.parametrize(("gate", "scale"), [(2.0, 1.0), (1.0, 2.0)])
def test_one_low_rank_that_is_scaled_is_not_plain(gate: float, scale: float) -> None:
    """What reads its factors alone would lose the factor."""
    low = LowRank(_tensor(_random(3, 8)), _tensor(_random(12, 3, seed=1)), 12, 8)
    model = _of(low)
    branch = Branch(low, Constant(gate), scale)
    model = model.replace(adapters={"a": Adapter("a", (branch,))})
    (found,) = FactorPyramid("float64").rewrite(model).adapters["a"].branches
    assert (found.gate, found.scale) == (Constant(1.0), 1.0)
    assert isinstance(found.delta, LowRank)
    u, v = found.delta.factors()
    np.testing.assert_allclose(u @ v, model.adapters["a"].delta(None), atol=1e-12)


def test_gates_that_are_not_constant_are_left_alone(model: AdaptedModel) -> None:
    assert FactorPyramid().rewrite(model) is model


def test_the_pipeline_holds_it_to_its_rounding(fixed: AdaptedModel) -> None:
    probe = LinearProbe()
    _, (record,) = run_adapter_passes(fixed, [FactorPyramid()], task_id=0, probe=probe)
    assert record.error is not None
    assert 0.0 < record.error <= 1.0
    for spoiled in ("float16", None):

        class Spoiled(FactorPyramid):
            """Rounds to float16 what it says is float32, or forgets a branch."""

            def rewrite(self, model: AdaptedModel, how: str | None = spoiled) -> AdaptedModel:
                if how is None:
                    first = model.adapters["a"]
                    fewer = dataclasses.replace(first, branches=first.branches[:1])
                    model = model.replace(adapters={**model.adapters, "a": fewer})
                    return super().rewrite(model)
                found = FactorPyramid("float64").rewrite(model)
                return found.replace(adapters={p: _halved(a) for p, a in found.adapters.items()})

        with pytest.raises(ParityError, match="factor-pyramid is exact, but moved"):
            run_adapter_passes(fixed, [Spoiled()], task_id=0, probe=probe)


def _halved(adapter: Adapter) -> Adapter:
    (branch,) = adapter.branches
    assert isinstance(branch.delta, LowRank)
    a, b = (_tensor(t.numpy().astype(np.float16).astype(np.float32)) for t in branch.delta.tensors)
    delta = dataclasses.replace(branch.delta, A=a, B=b)
    return dataclasses.replace(adapter, branches=(dataclasses.replace(branch, delta=delta),))
