"""Faults in one linear of a released checkpoint: in the reader alone, in one pass alone.

Each is as small as such a mistake is in nature. Where it is planted is the first linear on which
it matters for the task; the reference loads the checkpoint by itself and has no part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from eptc import run_passes
from eptc.ir import (
    AdaptedModel,
    Branch,
    CellScaledLowRank,
    Delta,
    Float64,
    PerTask,
    Route,
    Rows,
    TaskRouter,
)
from eptc.passes.drop_dead_experts import DropDeadExperts
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.passes.specialize_router import SpecializeRouter
from eptc.tensors import ArrayTensor, LazyTensor

# (model, path of the linear, task id) -> the model with a fault in that linear.
Fault = Callable[[AdaptedModel, str, int], AdaptedModel]

# A fault is planted where it moves the folded weight by this part, or more, of the largest element
# of what the experts add: ten times what the layer gate allows.
NOTICEABLE = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Wrong(Delta):
    """An expert that somebody computed wrongly: its matrix."""

    array: Float64
    out_features: int
    in_features: int

    def factors(self) -> tuple[Float64, Float64]:
        return self.array, np.eye(self.in_features)

    def reader(self) -> Rows:
        return lambda start, stop: self.array[start:stop]

    @property
    def rank_bound(self) -> int:
        return int(min(self.array.shape))

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        return ()


def with_branches(
    change: Callable[[tuple[Branch, ...], AdaptedModel, str], tuple[Branch, ...]],
) -> Fault:
    def fault(model: AdaptedModel, path: str, task: int) -> AdaptedModel:
        del task
        adapter = model.adapters[path]
        wrong = dataclasses.replace(adapter, branches=change(adapter.branches, model, path))
        return model.replace(adapters={**model.adapters, path: wrong})

    return fault


def with_router(change: Callable[[TaskRouter, TaskRouter], TaskRouter]) -> Fault:
    """`change` gets the linear's router and that of the next linear of equal width."""

    def branches(before: tuple[Branch, ...], model: AdaptedModel, path: str) -> tuple[Branch, ...]:
        own, other = model.adapters[path].router, model.adapters[neighbour(model, path)].router
        assert own is not None
        assert other is not None
        router = change(own, other)
        return tuple(
            dataclasses.replace(b, gate=PerTask(router, b.gate.expert))
            for b in before
            if isinstance(b.gate, PerTask)
        )

    return with_branches(branches)


def with_delta(matrix: Callable[[Parts], Float64]) -> Fault:
    """`matrix` makes the wrong [out, in] of every expert."""

    def branches(before: tuple[Branch, ...], model: AdaptedModel, path: str) -> tuple[Branch, ...]:
        del model, path
        return tuple(dataclasses.replace(b, delta=wrong(b.delta, matrix)) for b in before)

    return with_branches(branches)


def wrong(delta: Delta, matrix: Callable[[Parts], Float64]) -> Wrong:
    assert isinstance(delta, CellScaledLowRank)
    return Wrong(matrix(Parts.of(delta)), delta.out_features, delta.in_features)


def with_scale(scale: Callable[[float, int], float]) -> Fault:
    """`scale` gets alpha / r and r."""

    def branches(before: tuple[Branch, ...], model: AdaptedModel, path: str) -> tuple[Branch, ...]:
        del model, path
        rank = before[0].delta.tensors[0].shape[0]
        return tuple(dataclasses.replace(b, scale=scale(b.scale, rank)) for b in before)

    return with_branches(branches)


def with_weight(change: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], Any]) -> Fault:
    """`change` gets the linear's weight and that of the next linear of equal shape."""

    def fault(model: AdaptedModel, path: str, task: int) -> AdaptedModel:
        del task
        name = model.adapters[path].parameter
        own = model.weights[name].numpy()
        other = model.weights[f"{neighbour(model, path)}.weight"].numpy()
        array = np.ascontiguousarray(change(own, other), np.float32)
        return model.replace(weights={**model.weights, name: ArrayTensor(name, array)})

    return fault


def neighbour(model: AdaptedModel, path: str) -> str:
    """Return the next linear of the same shape."""
    shape = model.weights[f"{path}.weight"].shape
    alike = [p for p in sorted(model.adapters) if model.weights[f"{p}.weight"].shape == shape]
    return alike[(alike.index(path) + 1) % len(alike)]


# What a router may do wrong.


class Reversed(TaskRouter):
    """The right experts, their weights in the other order."""

    def route(self, task_id: int) -> Route:
        route = super().route(task_id)
        return dataclasses.replace(route, weights=route.weights[::-1])


class Even(TaskRouter):
    """The right experts, all with the same weight."""

    def route(self, task_id: int) -> Route:
        route = super().route(task_id)
        return dataclasses.replace(route, weights=(1 / len(route.weights),) * len(route.weights))


class Least(TaskRouter):
    """The least probable experts."""

    def route(self, task_id: int) -> Route:
        route = super().route(task_id)
        p = self.probabilities(task_id)
        return dataclasses.replace(
            route, experts=tuple(sorted(range(len(p)), key=lambda e: p[e])[: len(route.experts)])
        )


class Neighbour(TaskRouter):
    """The route of the next task."""

    def route(self, task_id: int) -> Route:
        return super().route((task_id + 1) % self.embedding.shape[0])


def as_kind(kind: type[TaskRouter]) -> Callable[[TaskRouter, TaskRouter], TaskRouter]:
    def change(router: TaskRouter, _: TaskRouter) -> TaskRouter:
        fields = {f.name: getattr(router, f.name) for f in dataclasses.fields(TaskRouter)}
        return kind(**fields)

    return change


def replaced(**changes: Any) -> Callable[[TaskRouter, TaskRouter], TaskRouter]:
    return lambda router, _: dataclasses.replace(router, **changes)


def rounded(tensor: LazyTensor, dtype: Any) -> ArrayTensor:
    return ArrayTensor(tensor.name, tensor.numpy().astype(dtype).astype(np.float32))


# What an expert may do wrong. K [cells, s], B [out // 2, r], A [r, in // 2].


@dataclasses.dataclass(frozen=True)
class Parts:
    A: Float64
    B: Float64
    K: Float64
    out: int
    columns: int

    @classmethod
    def of(cls, delta: CellScaledLowRank) -> Parts:
        kernel = delta.kernel.numpy().astype(np.float64)
        shape = kernel.shape[1:3] if kernel.ndim == 4 else kernel.shape
        return cls(
            delta.A.numpy().astype(np.float64),
            delta.B.numpy().astype(np.float64),
            kernel.reshape(shape),
            delta.out_features,
            delta.in_features,
        )

    @property
    def a(self) -> int:
        """How many inputs the expert reads."""
        return max(1, self.columns // int(self.K.shape[1]))

    def matrix(
        self, kernel: Float64 | None = None, B: Float64 | None = None, V: Float64 | None = None
    ) -> Float64:
        """The expert's matrix with some part replaced; V stands for the cropped A."""
        K = self.K if kernel is None else kernel
        cells = len(K)
        z = (self.B[:cells] if B is None else B) @ (self.A[:, : self.a] if V is None else V)
        rows = (K[:, :, None] * z[:, None, :]).reshape(-1, z.shape[1])
        return self.placed(rows)

    def placed(self, rows: Float64, top: int = 0, left: int = 0) -> Float64:
        d = np.zeros((self.out, self.columns))
        kept = min(self.out - top, len(rows))
        d[top : top + kept, left : left + rows.shape[1]] = rows[:kept]
        return d

    def rows(self) -> Float64:
        z = self.B[: len(self.K)] @ self.A[:, : self.a]
        return (self.K[:, :, None] * z[:, None, :]).reshape(-1, self.a)


def fitted(array: Float64, shape: tuple[int, int]) -> Float64:
    """Cut or pad with zeros."""
    result = np.zeros(shape)
    kept = array[: shape[0], : shape[1]]
    result[: kept.shape[0], : kept.shape[1]] = kept
    return result


def other_layout(p: Parts) -> Float64:
    z = p.B[: len(p.K)] @ p.A[:, : p.a]
    return p.placed((p.K.T[:, :, None] * z[None, :, :]).reshape(-1, p.a))


def swapped(p: Parts) -> Float64:
    return p.matrix(B=fitted(p.A.T, (len(p.K), len(p.A))), V=fitted(p.B.T, (len(p.A), p.a)))


def upsampled(p: Parts) -> Float64:
    wide = np.repeat(p.A[:, : p.a], p.K.shape[1], axis=1)
    return p.matrix(V=fitted(wide, (len(p.A), p.columns)))


def at_the_end(p: Parts) -> Float64:
    rows = p.rows()
    return p.placed(rows, left=p.columns - rows.shape[1])


def padded_in_front(p: Parts) -> Float64:
    rows = p.rows()
    return p.placed(rows, top=max(0, p.out - len(rows)))


# What the branches of a linear may be given wrongly.


def kernel_of_another(
    branches: tuple[Branch, ...], model: AdaptedModel, path: str
) -> tuple[Branch, ...]:
    """Experts of equal size have each other's kernels."""
    del model, path
    kernels = [b.delta.tensors[2] for b in branches]
    partner = [
        next((j for j, k in enumerate(kernels) if j != i and k.shape == kernels[i].shape), i)
        for i in range(len(kernels))
    ]
    return tuple(with_tensors(b, kernel=kernels[partner[i]]) for i, b in enumerate(branches))


def factor_of_another(name: str) -> Fault:
    def change(branches: tuple[Branch, ...], model: AdaptedModel, path: str) -> tuple[Branch, ...]:
        other = model.adapters[neighbour(model, path)].branches[0].delta
        return tuple(with_tensors(b, **{name: getattr(other, name)}) for b in branches)

    return with_branches(change)


def with_tensors(branch: Branch, **changes: Any) -> Branch:
    assert isinstance(branch.delta, CellScaledLowRank)
    return dataclasses.replace(branch, delta=dataclasses.replace(branch.delta, **changes))


def off_by_one(branches: tuple[Branch, ...], model: AdaptedModel, path: str) -> tuple[Branch, ...]:
    del model, path
    return tuple(
        dataclasses.replace(b, gate=PerTask(b.gate.router, (b.gate.expert + 1) % len(branches)))
        for b in branches
        if isinstance(b.gate, PerTask)
    )


GATES: dict[str, Fault] = {
    "top-k one less": with_router(replaced(top_k=1)),
    "top-k one more": with_router(replaced(top_k=3)),
    "renormalised gate": with_router(replaced(normalization="sum")),
    "probabilities as weights": with_router(replaced(normalization="none")),
    "temperature in the gate": with_router(replaced(temperature=0.05)),
    "no gate bias": with_router(replaced(bias=None)),
    "gate bias of another linear": with_router(lambda r, o: dataclasses.replace(r, bias=o.bias)),
    "gate of another linear": with_router(lambda r, o: dataclasses.replace(r, weight=o.weight)),
    "task embedding of another linear": with_router(
        lambda r, o: dataclasses.replace(r, embedding=o.embedding)
    ),
    "neighbour task": with_router(as_kind(Neighbour)),
    "weights in the other order": with_router(as_kind(Reversed)),
    "even weights": with_router(as_kind(Even)),
    "least probable experts": with_router(as_kind(Least)),
    "experts off by one": with_branches(off_by_one),
}

EXPERTS: dict[str, Fault] = {
    "kernel of another expert": with_branches(kernel_of_another),
    "shared kernel across cells": with_delta(
        lambda p: p.matrix(kernel=np.broadcast_to(p.K[0], p.K.shape))
    ),
    "mean kernel across cells": with_delta(
        lambda p: p.matrix(kernel=np.broadcast_to(p.K.mean(0), p.K.shape))
    ),
    "kernel flipped": with_delta(lambda p: p.matrix(kernel=p.K[:, ::-1])),
    "kernel in half precision": with_delta(
        lambda p: p.matrix(kernel=p.K.astype(np.float16).astype(np.float64))
    ),
    "upsampled input": with_delta(upsampled),
    "last inputs for the first": with_delta(at_the_end),
    "crop of A from its end": with_delta(lambda p: p.matrix(V=p.A[:, -p.a :])),
    "crop of B from its end": with_delta(lambda p: p.matrix(B=p.B[-len(p.K) :])),
    "missing crop": with_delta(lambda p: p.matrix(V=p.A)),
    "pad in front": with_delta(padded_in_front),
    "other layout of the cells": with_delta(other_layout),
    "swapped A and B": with_delta(swapped),
    "a rank too few": with_delta(lambda p: p.matrix(B=p.B[: len(p.K), :-1], V=p.A[:-1, : p.a])),
    "A of another linear": factor_of_another("A"),
    "B of another linear": factor_of_another("B"),
    "alpha for alpha/r": with_scale(lambda s, r: s * r),
    "alpha/sqrt(r) for alpha/r": with_scale(lambda s, r: s * r**0.5),
    "no scale": with_scale(lambda *_: 1.0),
    "mean of the experts": with_scale(lambda s, _: s / 2),
    "subtracted": with_scale(lambda s, _: -s),
    "dropped layer": with_branches(lambda *_: ()),
    "added twice": with_branches(lambda branches, *_: branches * 2),
    "weight of another linear": with_weight(lambda _, other: other),
    "transposed weight": with_weight(lambda w, _: w.T.reshape(w.shape)),
    "weight in half precision": with_weight(lambda w, _: w.astype(np.float16)),
}


class Planted(NamedTuple):
    path: str
    fault: Callable[[AdaptedModel], AdaptedModel]


def placed(fault: Fault, model: AdaptedModel, task: int, start: int) -> Planted:
    """Put a fault into the first linear, from the `start`th on, in which it matters."""
    paths = sorted(model.adapters)
    for path in paths[start % len(paths) :] + paths[: start % len(paths)]:
        sound, faulty = folded(model, path, task), folded(fault(model, path, task), path, task)
        branches = np.abs(model.adapters[path].delta(task)).max()
        if np.abs(faulty - sound).max() > NOTICEABLE * branches:
            return Planted(path, bound(fault, path, task))
    raise AssertionError("this fault changes nothing anywhere: it is no fault")


def bound(fault: Fault, path: str, task: int) -> Callable[[AdaptedModel], AdaptedModel]:
    return lambda model: fault(model, path, task)


def folded(model: AdaptedModel, path: str, task: int) -> Float64:
    adapter = model.adapters[path]
    weight = model.weights[adapter.parameter].numpy().astype(np.float64)
    return weight + adapter.delta(task) if adapter.branches else weight


@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
@pytest.mark.parametrize("what", [*GATES, *EXPERTS])
def test_in_the_reader(
    recorded: Any, refused: Any, plant_in_reader: Any, what: str, name: str
) -> None:
    subject, faults = recorded(name), {**GATES, **EXPERTS}
    number = list(faults).index(what)
    planted = placed(faults[what], subject.read().model, number % 8, number)
    plant_in_reader(planted.fault)
    message = refused(subject, number % 8)
    assert f"after the released reader, the linear {planted.path} differs" in message


@pytest.mark.parametrize("what", [*GATES, *EXPERTS])
def test_in_specialize_router(recorded: Any, refused: Any, plant_in_pass: Any, what: str) -> None:
    subject, faults = recorded("t5-gated-tiny"), {**GATES, **EXPERTS}
    number = list(faults).index(what)
    planted = placed(faults[what], subject.read().model, number % 8, number)
    plant_in_pass(SpecializeRouter, planted.fault)
    message = refused(subject, number % 8)
    assert "the pass specialize-router" in message
    assert planted.path in message


@pytest.mark.parametrize("what", EXPERTS)
def test_in_fold_pyramid(recorded: Any, refused: Any, plant_in_pass: Any, what: str) -> None:
    subject = recorded("t5-tiny")
    number = list(EXPERTS).index(what)
    before = DropDeadExperts().rewrite(SpecializeRouter(number % 8).rewrite(subject.read().model))
    planted = placed(EXPERTS[what], before, number % 8, number)
    plant_in_pass(FoldPyramid, planted.fault)
    message = refused(subject, number % 8)
    assert "the pass fold-pyramid" in message
    assert planted.path in message


@pytest.mark.parametrize(
    "what", ["top-k one less", "no gate bias", "kernel of another expert", "dropped layer"]
)
def test_in_a_pass_whose_contract_nobody_checks(
    recorded: Any,
    refused: Any,
    plant_in_pass: Any,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """The reference finds by itself what the pipeline's own check would have."""
    monkeypatch.setattr(run_passes, "measure", lambda *_: (None, None))
    subject, faults = recorded("llama-tiny"), {**GATES, **EXPERTS}
    planted = placed(faults[what], subject.read().model, 3, 0)
    plant_in_pass(SpecializeRouter, planted.fault)
    message = refused(subject, 3)
    assert f"after the pass specialize-router, the linear {planted.path} differs" in message


def test_expert_dropped_alive(
    recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that removes an expert which still counts."""
    sound = DropDeadExperts._drop

    def drop(self: DropDeadExperts, adapter: Any) -> Any:
        kept = sound(self, adapter)
        if adapter.target != "decoder.block.1.layer.0.SelfAttention.k":
            return kept
        return dataclasses.replace(kept, branches=kept.branches[:1])

    monkeypatch.setattr(DropDeadExperts, "_drop", drop)
    message = refused(recorded("t5-tiny"), "sst2")
    assert "the pass drop-dead-experts" in message
    assert "decoder.block.1.layer.0.SelfAttention.k" in message


def test_gate_in_bfloat16(recorded: Any, refused: Any, plant_in_reader: Any) -> None:
    """Of all routes of this checkpoint one has so small a margin that bfloat16 turns it."""
    path, task = "model.layers.1.self_attn.o_proj", 3
    fault = with_router(
        lambda r, _: dataclasses.replace(
            r,
            weight=rounded(r.weight, ml_dtypes.bfloat16),
            embedding=rounded(r.embedding, ml_dtypes.bfloat16),
        )
    )
    plant_in_reader(bound(fault, path, task))
    message = refused(recorded("llama-tiny"), task)
    assert f"after the released reader, the linear {path} differs" in message


def test_matrix_and_factors_differ(
    recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers are measured by an expert's factors, the fold forms its matrix: both must hold."""
    path, sound = "model.layers.0.mlp.down_proj", CellScaledLowRank.reader

    def reader(self: CellScaledLowRank) -> Rows:
        rows, factor = sound(self), 1.01 if path in self.A.name else 1.0
        return lambda start, stop: rows(start, stop) * factor

    monkeypatch.setattr(CellScaledLowRank, "reader", reader)
    message = refused(recorded("llama-tiny"), 1)
    assert "the pass fold-pyramid" in message
    assert path in message


def test_layer_adapted_on_one_side(recorded: Any, refused: Any, plant_in_reader: Any) -> None:
    path = "model.layers.1.mlp.up_proj"
    plant_in_reader(
        lambda model: model.replace(
            adapters={p: a for p, a in model.adapters.items() if p != path}
        )
    )
    assert f"{path} is adapted on one side only" in refused(recorded("llama-tiny"), 0)


def test_constant_gate_of_another_task(
    recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One linear is fixed for the next task, the others for the right one."""
    sound = SpecializeRouter._fix
    path = "encoder.block.0.layer.0.SelfAttention.q"

    def fix(self: SpecializeRouter, adapter: Any) -> Any:
        return sound(SpecializeRouter(self.task_id + (adapter.target == path)), adapter)

    monkeypatch.setattr(SpecializeRouter, "_fix", fix)
    message = refused(recorded("t5-tiny"), 2)
    assert "the pass specialize-router" in message
    assert path in message
