"""TuckA in ONNX: one route for many linears, and what each adds under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.ir import Adapter, CentroidRouter, Float64, InputRouter, Tucker
from eptc.ir.numbers import product, read
from eptc.lower.calls import Call
from eptc.lower.edit import constant, drop, insert, module, replace
from eptc.lower.weights import bound, join
from eptc.tensors import ComputedTensor, LazyTensor

__all__ = ["join_mixing", "lower_centroids", "lower_tucker"]

_BLOCK = 512 * 1024


def lower_centroids(router: InputRouter, call: Call) -> ir.Value:
    """Insert the router before the linear whose input it reads; return its gates.

    [1, 1, experts] for the batch, [batch, 1, experts] for rows; of the groups that are not
    chosen they are 0. Of equal groups the first is chosen. NaN logits make the gates NaN, as in
    the authors' code: 0 times NaN is NaN, and every group is added up.
    """
    assert isinstance(router, CentroidRouter)
    axes = (0, 1) if router.unit == "batch" else (1,)
    groups = router.groups
    weight = ComputedTensor(
        router.centroids.name, "float64", router.centroids.shape[::-1],
        lambda: np.ascontiguousarray(read(router.centroids).T),
    )  # fmt: skip
    build = _Builder(call, "router")
    mean = build("ReduceMean", call.x, build.ints(*axes), keepdims=1)
    logits = build("MatMul", mean, build.weight("centroids", weight))
    grouped = build("Reshape", logits, build.ints(0, groups, -1))
    norm = build("ReduceL2", grouped, build.ints(2), keepdims=1)
    scores = build("Sigmoid", build("Div", grouped, norm))
    if groups > 1:
        best = build("ReduceMax", scores, build.ints(2), keepdims=1)
        first = build("ArgMax", best, axis=1, keepdims=1, dtype=ir.DataType.INT64)
        number = constant(build.graph, np.arange(groups).reshape(1, groups, 1))
        chosen = build("Equal", first, number, dtype=ir.DataType.BOOL)
        one = build("Cast", chosen, to=int(ir.DataType.FLOAT), dtype=ir.DataType.FLOAT)
        scores = build("Mul", scores, one)
    return build("Reshape", scores, build.ints(0, 1, -1))


def lower_tucker(adapter: Adapter, gates: ir.Value, call: Call) -> ir.Value:
    """Insert an adapter's branches before its linear; return their sum [..., out].

        ((x U) M) V    M = sum_i scale_i * gate_i * core_i [r, r],  V = (W U)^T [r, out]

    Three small products beside the linear, whose own weight stays as it is. V is computed when it
    is written, in float64, some rows of W at a time. The experts' cores are mixed once a call of
    the router, not once a token.
    """
    deltas = [branch.delta for branch in adapter.branches if isinstance(branch.delta, Tucker)]
    first = deltas[0]
    if any((d.basis, d.weight) != (first.basis, first.weight) for d in deltas):
        raise InternalError(f"the experts of {adapter.target} do not share one basis")
    r = first.basis.shape[1]
    build = _Builder(call, "branch")
    cores = build.weight("cores", _cores(adapter, deltas))
    mixed = build("Reshape", build("MatMul", gates, cores), build.ints(0, r, r))
    low = build("MatMul", call.x, build.weight("basis", first.basis))
    shape = call.x.shape
    if shape is None:
        raise InternalError(f"the rank of the input of {call.path} is not known")
    # A row that is one vector becomes a sequence of one.
    single = len(shape) == 2
    if single:
        low = build("Unsqueeze", low, build.ints(1))
    values = build.weight("values", _values(first))
    result = build("MatMul", build("MatMul", low, mixed), values)
    return build("Squeeze", result, build.ints(1)) if single else result


def join_mixing(gates: ir.Value) -> None:
    """Mix the experts of every linear under one route at once, in place.

    Before: M_j = Reshape(MatMul(gates, cores_j), [routes, r, r])         for each linear j
    After:  M_1, M_2, ... = Split(Reshape(MatMul(gates, [cores_1, cores_2, ...])), axis=1)

    The products are so small that each costs a launch and little else.
    """
    mixings = [use.node for use in gates.uses() if use.node.op_type == "MatMul"]
    graph = mixings[0].graph if mixings else None
    if len(mixings) < 2 or not isinstance(graph, ir.Graph):
        return
    first = min(mixings, key=list(graph).index)
    path = module(first).removesuffix("/branch") + "/router"
    tables = [node.inputs[1] for node in mixings]
    tensors = [table.const_value for table in tables if table is not None and table.const_value]
    sizes = [math.isqrt(int(tensor.shape.numpy()[1])) for tensor in tensors]
    if len(tensors) < len(mixings) or len(set(sizes)) > 1:
        return
    name = f"{module(first).removesuffix('/branch')}.router.cores"
    tensor = join(tensors, axis=1, name=name)
    joined = ir.Value(name=name, const_value=tensor)
    joined.type, joined.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    graph.register_initializer(joined)
    stacked = constant(graph, np.array([0, sum(sizes), sizes[0]], np.int64))
    parts = constant(graph, np.array(sizes, np.int64))
    product = insert(first, "MatMul", [gates, joined], path=path).outputs[0]
    table = insert(first, "Reshape", [product, stacked], path=path).outputs[0]
    split = insert(first, "Split", [table, parts], {"axis": 1}, path=path, outputs=len(sizes))
    for node, mixed in zip(mixings, split.outputs, strict=True):
        (reshape,) = node.outputs[0].consumers()
        replace(reshape.outputs[0], mixed)
        drop(reshape.outputs[0])


def _cores(adapter: Adapter, deltas: Sequence[Tucker]) -> LazyTensor:
    """Return every expert's core times its scale, zero for one that is gone [experts, r * r]."""
    router = adapter.input_router
    assert router is not None
    rows = [
        (branch.gate.expert, branch.scale, delta.core)  # type: ignore[union-attr]
        for branch, delta in zip(adapter.branches, deltas, strict=True)
    ]
    r = deltas[0].basis.shape[1]

    def compute() -> Float64:
        table = np.zeros((router.num_experts, r * r))
        for expert, scale, core in rows:
            table[expert] = scale * read(core).ravel()
        return table

    return ComputedTensor(adapter.target, "float64", (router.num_experts, r * r), compute)


def _values(delta: Tucker) -> LazyTensor:
    """Return V = (W U)^T [r, out]."""

    def compute() -> Float64:
        weight, u = delta.weight.numpy(), read(delta.basis)
        values = np.empty((u.shape[1], len(weight)))
        step = max(1, _BLOCK // (8 * weight.shape[1]))
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].astype(np.float64)
            values[:, start : start + step] = product(rows, u).T
        return values

    shape = delta.basis.shape[1], delta.weight.shape[0]
    return ComputedTensor(delta.weight.name, "float64", shape, compute)


class _Builder:
    """Inserts nodes before a linear, called after it and the part they belong to."""

    def __init__(self, call: Call, part: str) -> None:
        self._call = call
        self._path = f"{call.path}/{part}"
        self._prefix = f"{call.path}.{part}"
        graph = call.node.graph
        assert isinstance(graph, ir.Graph)
        self.graph = graph

    def __call__(
        self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """Insert a node; its values' type is that of its first input unless `dtype` is given."""
        node = insert(self._call.node, op_type, inputs, attributes, path=self._path)
        value = node.outputs[0]
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant."""
        return constant(self.graph, np.array(numbers, np.int64))

    def weight(self, what: str, tensor: LazyTensor) -> ir.Value:
        """Return the initializer that holds a tensor, `<linear>.<part>.<what>`."""
        name = f"{self._prefix}.{what}"
        if (known := self.graph.initializers.get(name)) is not None:
            return known
        value = ir.Value(name=name, const_value=bound(tensor, name))
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(tensor.shape)
        self.graph.register_initializer(value)
        return value
