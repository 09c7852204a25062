"""Faults in one linear of a native checkpoint of the paper's formula, on an encoder classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eptc.ir import AdaptedModel, Delta, Kronecker, PerTask, Rows, TaskRouter
from eptc.nn import GateConfig, ModuleConfig, ScaleConfig
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.passes.specialize_router import SpecializeRouter
from eptc.tensors import LazyTensor

Array = np.ndarray[Any, Any]

QUERY = "bert.encoder.layer.0.attention.self.query"  # [34, 34]
WIDE = "bert.encoder.layer.0.intermediate.dense"  # [51, 34]
NARROW = "bert.encoder.layer.0.output.dense"  # [34, 51]
TASK = 1

D_OVER_T: dict[str, Any] = {
    "scale": ScaleConfig("d/T", denominator=3),
    "gate": GateConfig(temperature=0.5, normalization="none"),
}
SHARED: dict[str, Any] = {"sharing": "model"}
OWN_ALPHA: dict[str, Any] = {"modules": {QUERY: ModuleConfig(alpha=5.0, rank=2)}}


@dataclasses.dataclass(frozen=True, eq=False)
class Wrong(Delta):
    """An expert that somebody computed wrongly: its matrix."""

    array: Array
    out_features: int
    in_features: int

    def factors(self) -> tuple[Array, Array]:
        return self.array, np.eye(self.in_features)

    def reader(self) -> Rows:
        return lambda start, stop: self.array[start:stop]

    @property
    def rank_bound(self) -> int:
        return int(min(self.array.shape))

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Parts:
    """A [r, ...], B [..., r] and K [s, s] of one expert, its rows and columns of cells."""

    A: Array
    B: Array
    K: Array
    out: int
    columns: int

    @property
    def s(self) -> int:
        return len(self.K)

    @property
    def rows(self) -> int:
        return math.ceil(self.out / self.s)

    @property
    def cells(self) -> int:
        return math.ceil(self.columns / self.s)

    def z(self) -> Array:
        return np.asarray(self.B[: self.rows] @ self.A[:, : self.cells])

    def placed(self, matrix: Array) -> Array:
        """Cut or pad with zeros behind."""
        d = np.zeros((self.out, self.columns))
        kept = matrix[: self.out, : self.columns]
        d[: kept.shape[0], : kept.shape[1]] = kept
        return d


Matrix = Callable[[Parts], Array]
Fault = Callable[[AdaptedModel, str], AdaptedModel]


def expert(matrix: Matrix) -> Fault:
    """`matrix` makes the wrong [out, in] of every expert of the linear."""

    def wrong(delta: Delta) -> Wrong:
        assert isinstance(delta, Kronecker)
        A, B, K = (t.numpy().astype(np.float64) for t in delta.tensors)
        parts = Parts(A, B, K, delta.out_features, delta.in_features)
        return Wrong(matrix(parts), delta.out_features, delta.in_features)

    return branch(lambda b: dataclasses.replace(b, delta=wrong(b.delta)))


def scale(value: Callable[[Any], float]) -> Fault:
    """`value` makes the wrong scale of a branch."""
    return branch(lambda b: dataclasses.replace(b, scale=value(b)))


def gate(**changes: Any) -> Fault:
    return router(lambda r: dataclasses.replace(r, **changes))


def router(change: Callable[[TaskRouter], TaskRouter]) -> Fault:
    return branch(
        lambda b: dataclasses.replace(b, gate=PerTask(change(b.gate.router), b.gate.expert))
    )


def branch(change: Callable[[Any], Any]) -> Fault:
    def fault(model: AdaptedModel, path: str) -> AdaptedModel:
        adapter = model.adapters[path]
        # Routers are told apart by identity: one for all branches, as before.
        branches = tuple(map(change, adapter.branches))
        first = next((b.gate for b in branches if isinstance(b.gate, PerTask)), None)
        if first is not None:
            branches = tuple(
                dataclasses.replace(b, gate=PerTask(first.router, b.gate.expert)) for b in branches
            )
        wrong = dataclasses.replace(adapter, branches=branches)
        return model.replace(adapters={**model.adapters, path: wrong})

    return fault


def last(array: Array, count: int, axis: int) -> Array:
    return np.take(array, range(array.shape[axis] - count, array.shape[axis]), axis)


def from_the_end(p: Parts) -> Array:
    return np.kron(p.z(), p.K)[-p.out :, -p.columns :]


def per_row_only(p: Parts) -> Array:
    """The released code's expert: a scale for each row of a cell, inputs not blown up."""
    rows = np.repeat(p.z(), p.s, axis=0) * np.tile(p.K[:, :1], (p.rows, 1))
    return p.placed(rows)


def width(p: Any, rule: Callable[..., int], pick: Callable[..., int]) -> float:
    shape = p.delta.out_features, p.delta.in_features
    return rule(pick(shape) / p.delta.size) / 3


class Next(TaskRouter):
    """Reads the next task's embedding."""

    def probabilities(self, task_id: int) -> tuple[float, ...]:
        return super().probabilities((task_id + 1) % self.embedding.shape[0])


def next_task(r: TaskRouter) -> TaskRouter:
    return Next(**{f.name: getattr(r, f.name) for f in dataclasses.fields(TaskRouter)})


def tensor(name: str, change: Callable[[LazyTensor], LazyTensor]) -> Fault:
    """A wrong A, B or kernel of every expert."""
    return branch(
        lambda b: dataclasses.replace(
            b, delta=dataclasses.replace(b.delta, **{name: change(getattr(b.delta, name))})
        )
    )


# Fault, the linear it is planted in, and what the checkpoint differs in.
EXPERTS: dict[str, tuple[Fault, str, dict[str, Any]]] = {
    "kron in the other order": (expert(lambda p: p.placed(np.kron(p.K, p.z()))), QUERY, {}),
    "kernel transposed": (expert(lambda p: p.placed(np.kron(p.z(), p.K.T))), QUERY, {}),
    "kernel flipped": (expert(lambda p: p.placed(np.kron(p.z(), p.K[::-1, ::-1]))), WIDE, {}),
    "crop of B from its end": (
        expert(lambda p: p.placed(np.kron(last(p.B, p.rows, 0) @ p.A[:, : p.cells], p.K))),
        WIDE,
        {},
    ),
    "crop of A from its end": (
        expert(lambda p: p.placed(np.kron(p.B[: p.rows] @ last(p.A, p.cells, 1), p.K))),
        NARROW,
        {},
    ),
    "cells rounded down": (
        expert(lambda p: p.placed(np.kron(p.z()[: p.out // p.s, : p.columns // p.s], p.K))),
        WIDE,
        {},
    ),
    "crop from the end": (expert(from_the_end), NARROW, {}),
    "upsampled by repetition": (
        expert(lambda p: p.placed(np.kron(p.z(), np.ones((p.s, p.s))))),
        QUERY,
        {},
    ),
    "the released code's expert": (expert(per_row_only), QUERY, {}),
    "pad in front": (
        expert(lambda p: np.roll(p.placed(np.kron(p.z(), p.K)), 1, axis=1)),
        WIDE,
        {},
    ),
    "swapped A and B": (
        expert(lambda p: p.placed(np.kron(p.A[:, : p.rows].T @ p.B[: p.cells].T, p.K))),
        QUERY,
        {},
    ),
    "a rank too few": (
        expert(lambda p: p.placed(np.kron(p.B[: p.rows, :-1] @ p.A[:-1, : p.cells], p.K))),
        WIDE,
        {},
    ),
    "one kernel element lost": (
        expert(lambda p: p.placed(np.kron(p.z(), np.triu(p.K)))),
        QUERY,
        {},
    ),
    "shared crop at the wrong place": (
        expert(lambda p: p.placed(np.kron(last(p.B, p.rows, 0) @ last(p.A, p.cells, 1), p.K))),
        QUERY,
        SHARED,
    ),
    "shared A and B not cropped for the linear": (
        expert(lambda p: p.placed(np.kron(p.K, p.B @ p.A))),
        QUERY,
        SHARED,
    ),
    "d/T rounded down": (scale(lambda b: width(b, math.floor, min)), QUERY, D_OVER_T),
    "d/T of the longer side": (scale(lambda b: width(b, math.ceil, max)), WIDE, D_OVER_T),
    "d/T without the size": (
        scale(lambda b: min(b.delta.out_features, b.delta.in_features) / 3),
        NARROW,
        D_OVER_T,
    ),
    "d/T without T": (scale(lambda b: 3 * b.scale), QUERY, D_OVER_T),
    "1/T for d/T": (scale(lambda _: 1 / 3), QUERY, D_OVER_T),
    "alpha/r for d/T": (scale(lambda _: 16 / 3), QUERY, D_OVER_T),
    "alpha for alpha/r": (scale(lambda b: 3 * b.scale), WIDE, {}),
    "alpha/r of the other linears": (scale(lambda _: 16 / 3), QUERY, OWN_ALPHA),
    "rank of the other linears": (scale(lambda _: 5 / 3), QUERY, OWN_ALPHA),
}

GATES: dict[str, tuple[Fault, str, dict[str, Any]]] = {
    "no temperature": (gate(temperature=1.0), QUERY, {}),
    "default temperature": (gate(temperature=0.05), WIDE, {}),
    "not renormalised": (gate(normalization="none"), NARROW, {}),
    "a second softmax": (gate(normalization="softmax"), QUERY, {}),
    "renormalised where it must not be": (gate(normalization="sum"), QUERY, D_OVER_T),
    "top-k one less": (gate(top_k=1), WIDE, D_OVER_T),
    "top-k one more": (gate(top_k=3), NARROW, SHARED),
    "every expert": (gate(top_k=4), NARROW, {}),
    "neighbour task": (router(next_task), QUERY, SHARED),
    "gate weight as embedding": (
        router(lambda r: dataclasses.replace(r, embedding=r.weight)),
        QUERY,
        {},
    ),
}


@pytest.mark.parametrize("what", [*EXPERTS, *GATES])
def test_in_the_reader(paper: Any, refused: Any, plant_in_reader: Any, what: str) -> None:
    fault, path, options = {**EXPERTS, **GATES}[what]
    plant_in_reader(lambda model: fault(model, path))
    message = refused(paper(**options), TASK)
    assert f"after the native reader, the linear {path} differs" in message


@pytest.mark.parametrize("what", [*EXPERTS, *GATES])
def test_in_specialize_router(paper: Any, refused: Any, plant_in_pass: Any, what: str) -> None:
    fault, path, options = {**EXPERTS, **GATES}[what]
    plant_in_pass(SpecializeRouter, lambda model: fault(model, path))
    message = refused(paper(**options), TASK)
    assert "the pass specialize-router" in message
    assert path in message


@pytest.mark.parametrize("what", EXPERTS)
def test_in_fold_pyramid(paper: Any, refused: Any, plant_in_pass: Any, what: str) -> None:
    fault, path, options = EXPERTS[what]
    plant_in_pass(FoldPyramid, lambda model: fault(model, path))
    message = refused(paper(**options), TASK)
    assert "the pass fold-pyramid" in message
    assert path in message
