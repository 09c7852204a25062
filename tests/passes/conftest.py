"""A small adapted model in the IR, made of arrays."""

from __future__ import annotations

import numpy as np
import pytest

from eptc.ir import (
    AdaptedModel,
    Adapter,
    Branch,
    CellScaledLowRank,
    Kronecker,
    PerTask,
    TaskRouter,
)
from eptc.tasks import Task
from eptc.tensors import ArrayTensor, LazyTensor

SIZES = (2, 3, 4)


def tensor(rng: np.random.Generator, name: str, *shape: int) -> LazyTensor:
    return ArrayTensor(name, rng.standard_normal(shape).astype(np.float32))


def adapter(
    rng: np.random.Generator, path: str, out: int, columns: int, *, paper: bool
) -> Adapter:
    router = TaskRouter(
        tensor(rng, "G", len(SIZES), columns),
        None if paper else tensor(rng, "b", len(SIZES)),
        tensor(rng, "e", 2, columns),
        top_k=2,
        temperature=1.0,
        normalization="sum" if paper else "softmax",
    )
    a = tensor(rng, "A", 2, columns)
    b = tensor(rng, "B", out, 2)
    branches = []
    for e, s in enumerate(SIZES):
        shape = (s, s) if paper else (max(1, out // s), s)
        family = Kronecker if paper else CellScaledLowRank
        delta = family(a, b, tensor(rng, f"K{e}", *shape), out, columns)
        branches.append(Branch(delta, PerTask(router, e), 2.0))
    return Adapter(path, tuple(branches))


@pytest.fixture
def model() -> AdaptedModel:
    """Two linears (one of each variant), two tasks, one of them with a head."""
    rng = np.random.default_rng(0)
    return AdaptedModel(
        config={"model_type": "bert", "hidden_size": 12},
        weights={
            "a.weight": tensor(rng, "a.weight", 10, 12),
            "b.weight": tensor(rng, "b.weight", 7, 9),
            "head.weight": tensor(rng, "head.weight", 4, 10),
            "norm.weight": tensor(rng, "norm.weight", 10),
        },
        adapters={
            "a": adapter(rng, "a", 10, 12, paper=False),
            "b": adapter(rng, "b", 7, 9, paper=True),
        },
        heads={"first": {"head.weight": tensor(rng, "head.weight", 2, 10)}},
        tasks=(
            Task("first", "classification", labels=("no", "yes")),
            Task("second", "generation"),
        ),
    )
