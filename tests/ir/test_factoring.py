"""minimal_factors: the sum of a linear's branches for one task, in the least rank there is."""

from __future__ import annotations

import numpy as np
import pytest

from eptc.errors import InternalError
from eptc.ir import (
    Adapter,
    Branch,
    CellScaledLowRank,
    Constant,
    Delta,
    Float64,
    Kronecker,
    LowRank,
    PerTask,
    TaskRouter,
    minimal_factors,
)
from eptc.tensors import ArrayTensor


def _random(*shape: int, seed: int = 0) -> Float64:
    return np.random.default_rng(seed).standard_normal(shape)


def _tensor(array: Float64) -> ArrayTensor:
    return ArrayTensor("t", array)


def _constant(*weighed: tuple[float, Delta]) -> Adapter:
    return Adapter("a", tuple(Branch(delta, Constant(gate), 1.0) for gate, delta in weighed))


def _low(a: Float64, b: Float64) -> LowRank:
    return LowRank(_tensor(a), _tensor(b), len(b), a.shape[1])


@pytest.mark.parametrize("family", [CellScaledLowRank, Kronecker])
@pytest.mark.parametrize("task_id", [0, 1])
def test_gates_that_read_the_task(
    family: type[CellScaledLowRank] | type[Kronecker], task_id: int
) -> None:
    router = TaskRouter(
        _tensor(_random(3, 4)), None, _tensor(_random(2, 4, seed=1)),
        top_k=2, temperature=1.0, normalization="sum",
    )  # fmt: skip
    a, b = _tensor(_random(2, 11, seed=2)), _tensor(_random(13, 2, seed=3))
    branches = []
    for expert, size in enumerate((2, 3, 3)):
        rows = 13 // size if family is CellScaledLowRank else size
        kernel = _tensor(_random(rows, size, seed=4 + expert))
        branches.append(Branch(family(a, b, kernel, 13, 11), PerTask(router, expert), 1.5))
    adapter = Adapter("a", tuple(branches))
    u, v = minimal_factors(adapter, task_id)
    want = adapter.delta(task_id)
    np.testing.assert_allclose(u @ v, want, rtol=0, atol=1e-13)
    assert u.shape[1] == np.linalg.matrix_rank(want)
    with pytest.raises(InternalError, match="without a task"):
        minimal_factors(adapter, None)


def test_full_rank_is_left_as_it_was_trained() -> None:
    a, b = _random(3, 8), _random(12, 3, seed=1)
    u, v = minimal_factors(_constant((0.5, _low(a, b))), None)
    np.testing.assert_array_equal(u, 0.5 * b)
    np.testing.assert_array_equal(v, a)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_rows_that_depend_on_others_go(scale: float) -> None:
    """Whatever size a branch has: neither small rows nor large ones hide what depends on what."""
    a, b = _random(3, 8), _random(12, 3, seed=1)
    mixed = _random(4, 3, seed=2) @ a
    adapter = _constant((1.0, _low(a, b)), (scale, _low(mixed, _random(12, 4, seed=3))))
    u, v = minimal_factors(adapter, None)
    assert u.shape == (12, 3)
    want = adapter.delta(None)
    np.testing.assert_allclose(u @ v, want, rtol=0, atol=1e-13 * np.abs(want).max())
    assert np.abs(u).max() <= 1.0  # no digits are lost to factors that are larger than need be


def test_columns_that_depend_on_others_go() -> None:
    b = _random(12, 2, seed=1)
    adapter = _constant((1.0, _low(_random(3, 8), np.hstack([b, b[:, :1] - b[:, 1:]]))))
    u, v = minimal_factors(adapter, None)
    assert u.shape == (12, 2)
    np.testing.assert_allclose(u @ v, adapter.delta(None), rtol=0, atol=1e-13)


def test_rank_is_at_most_that_of_the_matrix() -> None:
    u, v = minimal_factors(_constant((1.0, _low(_random(20, 8), _random(12, 20, seed=1)))), None)
    assert (u.shape, v.shape) == ((12, 8), (8, 8))


@pytest.mark.parametrize("gates", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.0), (0.1, 0.2, -0.3)])
@pytest.mark.parametrize("family", ["low rank", "cells", "kronecker"])
def test_branches_that_cancel_leave_nothing(gates: tuple[float, ...], family: str) -> None:
    """0.1 + 0.2 - 0.3 is not zero in float64: what it leaves is not a rank."""
    a, b = _tensor(_random(2, 8)), _tensor(_random(12, 2, seed=1))
    delta: Delta = {
        "low rank": LowRank(a, b, 12, 8),
        "cells": CellScaledLowRank(a, b, _tensor(_random(6, 2, seed=2)), 12, 8),
        "kronecker": Kronecker(a, b, _tensor(_random(2, 2, seed=2)), 12, 8),
    }[family]
    u, v = minimal_factors(_constant(*((gate, delta) for gate in gates)), None)
    assert (u.shape, v.shape) == ((12, 0), (0, 8))


def test_kernels_of_one_size_are_summed() -> None:
    """Two kernels of full rank whose sum has rank 1 take as many rows as one of rank 1."""
    a, b = _tensor(_random(2, 8)), _tensor(_random(12, 2, seed=1))
    one, column, row = _random(2, 2, seed=2), _random(2, 1, seed=3), _random(1, 2, seed=4)
    kernels = [_tensor(one), _tensor(column @ row - one)]
    adapter = _constant(*((1.0, Kronecker(a, b, kernel, 12, 8)) for kernel in kernels))
    u, v = minimal_factors(adapter, None)
    assert u.shape == (12, 2)
    np.testing.assert_allclose(u @ v, adapter.delta(None), rtol=0, atol=1e-13)
