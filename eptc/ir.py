"""The adapter IR: linears with gated branches beside their weight.

::

    y = W0 x + b + sum over branches of  scale * gate(context) * D x

A branch's `Delta` D is a structured operator [out, in]; its `Gate` says what it depends on.
Everything is immutable: a pass returns a new model.
"""

from __future__ import annotations

import abc
import dataclasses
import decimal
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eptc.errors import InternalError
from eptc.tasks import Task
from eptc.tensors import LazyTensor

__all__ = [
    "AdaptedModel",
    "Adapter",
    "Branch",
    "CellScaledLowRank",
    "Constant",
    "Delta",
    "Float64",
    "Gate",
    "Kronecker",
    "Normalization",
    "PerTask",
    "Route",
    "TaskRouter",
]

Float64 = npt.NDArray[np.float64]
Normalization = Literal["softmax", "sum", "none"]


def _f64(tensor: LazyTensor) -> Float64:
    return tensor.numpy().astype(np.float64)


def _product(u: Float64, v: Float64) -> Float64:
    """Return u v, summed in one fixed order on every machine.

    A BLAS sums in an order that depends on the processor; a weight that is folded in float64 and
    then rounded would differ in its last bit here and there.
    """
    total = np.zeros((u.shape[0], v.shape[1]))
    for column, row in zip(u.T, v, strict=True):
        total += column[:, None] * row
    return total


def _kron(a: Float64, b: Float64) -> Float64:
    return np.asarray(np.kron(a, b), np.float64)


class Delta(abc.ABC):
    """A structured operator [out_features, in_features] that a branch adds to its linear."""

    out_features: int
    in_features: int

    @abc.abstractmethod
    def factors(self) -> tuple[Float64, Float64]:
        """Return U [out, k] and V [k, in], exact low-rank factors: D = U V."""

    @abc.abstractmethod
    def dense(self) -> Float64:
        """Return D [out, in] in float64, the same to the bit on every machine."""

    def apply(self, x: Float64) -> Float64:
        """Return D x for rows x [..., in]: [..., out]."""
        u, v = self.factors()
        return np.asarray((x @ v.T) @ u.T)

    @property
    @abc.abstractmethod
    def rank_bound(self) -> int:
        """An upper bound of D's rank."""

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The tensors D is made of."""


@dataclasses.dataclass(frozen=True, eq=False)
class CellScaledLowRank(Delta):
    """The released code's expert: a cropped low rank whose output cells are scaled one by one.

    With s the kernel size, a = max(1, in // s) and c = max(1, out // s):

        D[o, i] = K[o // s, o % s] * sum_r B[o // s, r] A[r, i]    for i < a, o < min(out, c s)

    and zero elsewhere.

    Args:
        A: [r, in // 2].
        B: [out // 2, r].
        kernel: K [c, s], or [1, c, s, 1] as the released code stores it.
        out_features: out.
        in_features: in.
    """

    A: LazyTensor
    B: LazyTensor
    kernel: LazyTensor
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """The kernel size s."""
        return self._cells_and_size[1]

    @property
    def _cells_and_size(self) -> tuple[int, int]:
        shape = self.kernel.shape
        return (shape[1], shape[2]) if len(shape) == 4 else (shape[0], shape[1])

    def factors(self) -> tuple[Float64, Float64]:
        """Return U [out, r] = K[o // s, o % s] B[o // s] and V [r, in] = A, cropped and padded."""
        cells, s = self._cells_and_size
        columns = max(1, self.in_features // s)
        kernel = _f64(self.kernel).reshape(cells, s, 1)
        rows = (kernel * _f64(self.B)[:cells, None, :]).reshape(cells * s, -1)
        u = np.zeros((self.out_features, rows.shape[1]))
        kept = min(self.out_features, cells * s)
        u[:kept] = rows[:kept]
        v = np.zeros((self.A.shape[0], self.in_features))
        v[:, :columns] = _f64(self.A)[:, :columns]
        return u, v

    def dense(self) -> Float64:
        """Return D [out, in]: each cell's row of B A repeated s times and scaled."""
        cells, s = self._cells_and_size
        columns = max(1, self.in_features // s)
        z = _product(_f64(self.B)[:cells], _f64(self.A)[:, :columns])
        rows = (_f64(self.kernel).reshape(cells, s, 1) * z[:, None, :]).reshape(cells * s, -1)
        kept = min(self.out_features, cells * s)
        d = np.zeros((self.out_features, self.in_features))
        d[:kept, :columns] = rows[:kept]
        return d

    @property
    def rank_bound(self) -> int:
        """The smallest of r, a and out."""
        columns = max(1, self.in_features // self.size)
        return min(self.A.shape[0], columns, self.out_features)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """A, B and the kernel."""
        return self.A, self.B, self.kernel


@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """The paper's expert: a crop of B A, every entry replaced by a multiple of an s x s kernel.

        D = kron(B[:ceil(out/s)] @ A[:, :ceil(in/s)], K)[:out, :in]

    Args:
        A: [r, >= ceil(in / s)].
        B: [>= ceil(out / s), r].
        kernel: K [s, s].
        out_features: out.
        in_features: in.
    """

    A: LazyTensor
    B: LazyTensor
    kernel: LazyTensor
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """The kernel size s."""
        return self.kernel.shape[0]

    def _crops(self) -> tuple[Float64, Float64, Float64]:
        s = self.size
        rows, columns = math.ceil(self.out_features / s), math.ceil(self.in_features / s)
        return _f64(self.B)[:rows], _f64(self.A)[:, :columns], _f64(self.kernel)

    def factors(self) -> tuple[Float64, Float64]:
        """Return kron(B, K) [out, r s] and kron(A, I) [r s, in], cropped."""
        b, a, kernel = self._crops()
        u = _kron(b, kernel)[: self.out_features]
        v = _kron(a, np.eye(self.size))[:, : self.in_features]
        return u, v

    def dense(self) -> Float64:
        """Return D [out, in] straight from its definition."""
        b, a, kernel = self._crops()
        return _kron(_product(b, a), kernel)[: self.out_features, : self.in_features]

    @property
    def rank_bound(self) -> int:
        """rank(Z) rank(K) is at most r s."""
        return min(self.A.shape[0] * self.size, self.out_features, self.in_features)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """A, B and the kernel."""
        return self.A, self.B, self.kernel


@dataclasses.dataclass(frozen=True)
class Route:
    """Which experts a task uses in one linear.

    Args:
        experts: chosen experts, largest probability first.
        weights: their mixing weights, in the same order.
        margin: log p of the last expert chosen minus log p of the first one left out;
            infinite where none is left out. Tiny margins can flip under other arithmetic.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    margin: float


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRouter:
    """A router that reads the task embedding alone: static for a fixed task.

        p = softmax((G e_t + b) / temperature);  the top_k largest are kept, then normalised

    Args:
        weight: G [experts, in].
        bias: b [experts], or None.
        embedding: e [rows >= tasks, in].
        top_k: how many experts are kept; clamped to [1, experts].
        temperature: divides the logits.
        normalization: `softmax` of the kept probabilities (released code), division by their
            `sum` (paper), or `none`.
    """

    weight: LazyTensor
    bias: LazyTensor | None
    embedding: LazyTensor
    top_k: int
    temperature: float
    normalization: Normalization

    @property
    def num_experts(self) -> int:
        """How many experts the router chooses from."""
        return self.weight.shape[0]

    def probabilities(self, task_id: int) -> tuple[float, ...]:
        """Return p [experts] for the embedding row `task_id`, the same on every machine."""
        embedding = _f64(self.embedding)[task_id]
        bias = np.zeros(self.num_experts) if self.bias is None else _f64(self.bias)
        logits = [
            math.fsum((*row, b)) / self.temperature
            for row, b in zip(_f64(self.weight) * embedding, bias, strict=True)
        ]
        return _softmax(logits)

    def route(self, task_id: int) -> Route:
        """Return a task's experts and weights; of equal probabilities the lower index wins."""
        p = self.probabilities(task_id)
        k = min(max(self.top_k, 1), self.num_experts)
        order = sorted(range(len(p)), key=lambda e: (-p[e], e))
        kept = tuple(p[e] for e in order[:k])
        if self.normalization == "softmax":
            kept = _softmax(kept)
        elif self.normalization == "sum":
            kept = tuple(value / math.fsum(kept) for value in kept)
        return Route(tuple(order[:k]), kept, _margin([p[e] for e in order], k))

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The router's own tensors."""
        return tuple(t for t in (self.weight, self.bias, self.embedding) if t is not None)


def _softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """Return softmax in float64; exp in decimal, since exp of libm and of SIMD code differ."""
    with decimal.localcontext(prec=40):
        exact = [decimal.Decimal(value) for value in logits]
        powers = [(value - max(exact)).exp() for value in exact]
        return tuple(float(power / sum(powers)) for power in powers)


def _margin(descending: Sequence[float], k: int) -> float:
    """Log of the last probability kept over the first one left out."""
    if k == len(descending) or descending[k] == 0.0:
        return math.inf
    return math.log(descending[k - 1]) - math.log(descending[k])


@dataclasses.dataclass(frozen=True)
class Constant:
    """A gate that depends on nothing: the number `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True, eq=False)
class PerTask:
    """A gate that depends on the task: the router's weight for one expert.

    Args:
        router: the router of the adapted linear, shared by its branches.
        expert: which expert the branch holds.
    """

    router: TaskRouter
    expert: int


Gate = Constant | PerTask


@dataclasses.dataclass(frozen=True)
class Branch:
    """scale * gate * delta; `scale` has no unit."""

    delta: Delta
    gate: Gate
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The branches beside one linear.

    Args:
        target: path of the linear's module; its weight is the parameter `<target>.weight`.
        branches: the branches; empty once they are folded.
    """

    target: str
    branches: tuple[Branch, ...]

    @property
    def parameter(self) -> str:
        """Name of the weight the branches stand beside."""
        return f"{self.target}.weight"

    @property
    def router(self) -> TaskRouter | None:
        """The router the branches share, None where every gate is constant."""
        for branch in self.branches:
            if isinstance(branch.gate, PerTask):
                return branch.gate.router
        return None

    def factors(self, task_id: int | None) -> tuple[float, ...]:
        """Return scale * gate of each branch for a task.

        Raises:
            InternalError: a gate depends on the task and none is given.
        """
        weights: Mapping[int, float] = {}
        if (router := self.router) is not None:
            if task_id is None:
                raise InternalError(
                    f"the routed adapter at {self.target} was asked without a task"
                )
            route = router.route(task_id)
            weights = dict(zip(route.experts, route.weights, strict=True))
        return tuple(
            branch.scale
            * (
                branch.gate.factor
                if isinstance(branch.gate, Constant)
                else weights.get(branch.gate.expert, 0.0)
            )
            for branch in self.branches
        )

    def delta(self, task_id: int | None) -> Float64:
        """Return the sum of the branches [out, in] in float64; zero where there are none."""
        first = self.branches[0].delta
        total = np.zeros((first.out_features, first.in_features))
        for factor, branch in zip(self.factors(task_id), self.branches, strict=True):
            if factor != 0.0:
                total += factor * branch.delta.dense()
        return total


@dataclasses.dataclass(frozen=True)
class AdaptedModel:
    """A base model, the adapters beside its linears, and the tasks it was trained for.

    Args:
        config: the base's Hugging Face configuration as JSON values.
        weights: every parameter of the task model by its name there; lazy, tied ones once.
        adapters: by the path of their linear.
        heads: parameters that replace the base's, by task name, then parameter name.
        tasks: in the order of their ids.
        task_id: the task the model is specialised for; None while it serves all.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, LazyTensor]
    adapters: Mapping[str, Adapter]
    heads: Mapping[str, Mapping[str, LazyTensor]]
    tasks: tuple[Task, ...]
    task_id: int | None = None

    @property
    def task(self) -> Task | None:
        """The task the model is specialised for."""
        return None if self.task_id is None else self.tasks[self.task_id]

    def replace(self, **changes: Any) -> AdaptedModel:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def validate(self) -> None:
        """Check the invariants every pass must keep.

        Raises:
            InternalError: an adapter without its weight or of another shape, a task id or head
                that names no task, a gate that needs a task after the task was fixed.
        """
        if self.task_id is not None and not 0 <= self.task_id < len(self.tasks):
            raise InternalError(f"task id {self.task_id} of {len(self.tasks)} tasks")
        names = {task.name for task in self.tasks}
        if unknown := [name for name in self.heads if name not in names]:
            raise InternalError(f"a head names the unknown task {unknown[0]!r}")
        for path, adapter in self.adapters.items():
            if adapter.target != path or adapter.parameter not in self.weights:
                raise InternalError(f"the adapter at {path!r} has no weight")
            shape = self.weights[adapter.parameter].shape
            for branch in adapter.branches:
                if (branch.delta.out_features, branch.delta.in_features) != shape:
                    raise InternalError(f"a branch at {path} does not fit its weight {shape}")
                if self.task_id is not None and not isinstance(branch.gate, Constant):
                    raise InternalError(f"{path} has a {type(branch.gate).__name__} gate left")
