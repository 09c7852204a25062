"""One graph for several tasks: each row of a batch has the low ranks and the head of its own.

::

    ids = task_ids where they are not negative, else `count`, which Gather refuses    [batch]
    y   = x W^T + (x Gather(A, ids)) Gather(B, ids)

A [count, in, k] and B [count, k, out] hold the tasks' factors, transposed and filled up with
zeros to the largest rank. Linears that read the same x share the first product: their A stand
side by side, under all their names. A linear's own bias becomes one more row of its B, under
both names, which a column of ones behind the first product reads: what the tasks add is then
added where the bias was, and costs no pass over y of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from eptc.errors import CheckpointError, InternalError
from eptc.ir import Adapter, Float64, LowRank, OfTask
from eptc.ir.numbers import read
from eptc.lower.branch_nodes import BranchNodes
from eptc.lower.calls import Call, add_to, calls
from eptc.lower.edit import constant, drop, insert, replace
from eptc.lower.weights import PACKED, STACKED
from eptc.runtime.spec import TASK_IDS
from eptc.tensors import LazyTensor

__all__ = ["insert_tasks"]


def insert_tasks(
    model: ir.Model,
    adapters: Mapping[str, Adapter],
    heads: Sequence[Mapping[str, LazyTensor]],
    task_ids: Sequence[int],
) -> None:
    """Give a graph the input `task_ids` [batch], and each row what its task adds, in place.

    A task is known by its place in `task_ids`. With any other number, negative ones too, the
    graph fails on a CPU; CUDA's Gather reads zeros instead, so whoever feeds it has to check.

    Args:
        model: a bound graph, as it was traced: its transposes are not folded yet.
        adapters: by the path of their linear; their gates are `OfTask`, their deltas `LowRank`.
        heads: of each task, what replaces parameters of the graph: every task's has the same
            names. Where one has fewer rows than the graph's, zeros fill it up.
        task_ids: the tasks.

    Raises:
        CheckpointError: a linear that is not executed on the rows of a batch, or a parameter of
            a head that is neither weight nor bias of a linear.
    """
    graph = model.graph
    left = {path: adapter for path, adapter in adapters.items() if adapter.branches}
    stacks = _Stacks(graph, len(task_ids))
    found = calls(graph, left)
    executions = collections.Counter(call.path for call in found)
    groups: dict[object, list[Call]] = {}
    for call in found:
        _check_rows(call)
        groups.setdefault(call.x if executions[call.path] == 1 else call, []).append(call)
    own = {name for head in heads for name in head}
    for together in groups.values():
        factors = [_factors(left[call.path], task_ids) for call in together]
        _add_branches(together, factors, stacks, own)
    for name in sorted(own):
        if name in graph.initializers:
            _replace_parameter(graph, name, [head[name] for head in heads], stacks)


def _check_rows(call: Call) -> None:
    assert call.x.shape is not None
    if isinstance(call.x.shape[0], int):
        raise CheckpointError(
            f"{call.path} reads no row of the batch: its input is {call.x}",
            expected="adapters of linears that are executed on each row, for several tasks in "
            "one engine",
            fix="export each task by itself, or as a pack",
        )


class _Stacks:
    """Initializers [tasks, ...], and of each row the part of its task."""

    def __init__(self, graph: ir.Graph, count: int) -> None:
        self._count = count
        ids = ir.Value(
            name=TASK_IDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"])
        )
        first = graph[0]
        graph.inputs.append(ids)
        zero, beyond = (constant(graph, np.array(number, np.int64)) for number in (0, count))
        negative = insert(first, "Less", [ids, zero], path=TASK_IDS).outputs[0]
        negative.type = ir.TensorType(ir.DataType.BOOL)
        safe = insert(first, "Where", [negative, beyond, ids], path=TASK_IDS).outputs[0]
        safe.type, safe.shape = ids.type, ids.shape
        self._ids = safe

    def rows(
        self,
        nodes: BranchNodes,
        name: str,
        shape: tuple[int, ...],
        parts: Sequence[Callable[[], Float64]],
    ) -> ir.Value:
        """Return [batch, *shape]: of each row the part of its task.

        Args:
            nodes: where it is read.
            name: of the initializer.
            shape: of a part, filled up with zeros.
            parts: what computes each task's.
        """

        def stacked() -> Float64:
            found = np.zeros((self._count, *shape))
            for place, part in zip(found, parts, strict=True):
                array = part()
                place[tuple(slice(size) for size in array.shape)] = array
            return found

        stack = nodes.weight(name, (self._count, *shape), stacked, ("tasks", name))
        found = nodes.op("Gather", stack, self._ids, axis=0)
        found.shape = ir.Shape(["batch", *shape])
        return found


def _factors(adapter: Adapter, task_ids: Sequence[int]) -> list[LowRank | None]:
    """Return each task's low rank; None for a task that adds nothing here."""
    found: dict[int, LowRank] = {}
    for branch in adapter.branches:
        gate, delta = branch.gate, branch.delta
        if not isinstance(gate, OfTask) or not isinstance(delta, LowRank) or branch.scale != 1.0:
            raise InternalError(f"the tasks of {adapter.target} were not stacked")
        found[gate.task_id] = delta
    return [found.get(task_id) for task_id in task_ids]


def _rank(factors: Sequence[LowRank | None]) -> int:
    return max(delta.A.shape[0] for delta in factors if delta is not None)


@dataclasses.dataclass(frozen=True)
class _Bias:
    """The bias of a linear: y2 = Add(y, bias)."""

    value: ir.Value
    node: ir.Node
    index: int


def _bias(call: Call, own: Collection[str]) -> _Bias | None:
    """Return the bias that is added to a linear; None where there is none, or tasks have `own`."""
    name, uses = f"{call.path}.bias", tuple(call.y.uses())
    batches = call.node.op_type == "MatMul" and len(call.x.shape or ()) == 3
    if not batches or len(uses) != 1 or name in own:
        return None
    node, index = uses[0]
    other = node.inputs[1 - index] if node.op_identifier() == ("", "Add", "") else None
    if other is None or other.name != name or not other.is_initializer():
        return None
    return _Bias(other, node, 1 - index)


def _add_branches(
    together: Sequence[Call],
    factors: Sequence[Sequence[LowRank | None]],
    stacks: _Stacks,
    own: Collection[str],
) -> None:
    """Add to linears that read one x what the tasks of its rows add to each."""
    first = together[0]
    nodes = BranchNodes(first)
    ranks = [_rank(of_linear) for of_linear in factors]
    down = stacks.rows(
        nodes,
        PACKED.join(f"{call.path}{STACKED}A" for call in together),
        (_features(first.x), sum(ranks)),
        [functools.partial(_side_by_side, deltas, ranks) for deltas in zip(*factors, strict=True)],
    )
    hidden: Sequence[ir.Value] = [_times(nodes, first.x, down)]
    if len(together) > 1:
        inputs = [hidden[0], nodes.numbers(*ranks)]
        kinds = [ir.DataType.FLOAT] * len(ranks)
        hidden = nodes.ops("Split", inputs, kinds, {"axis": -1})
        for part, rank in zip(hidden, ranks, strict=True):
            part.shape = _as_wide(inputs[0], rank)
    for call, part, of_linear, rank in zip(together, hidden, factors, ranks, strict=True):
        nodes, bias, name = BranchNodes(call), _bias(call, own), f"{call.path}{STACKED}B"
        if bias is None:
            up = stacks.rows(
                nodes,
                name,
                (rank, _features(call.y)),
                [functools.partial(_transposed, None if d is None else d.B) for d in of_linear],
            )
            add_to(call, _unrolled(nodes, _matmul(nodes, part, up)))
            continue
        tensor = bias.value.const_value
        assert tensor is not None
        up = stacks.rows(
            nodes,
            f"{name}{PACKED}{bias.value.name}",
            (rank + 1, _features(call.y)),
            [functools.partial(_with_bias, d, tensor, rank) for d in of_linear],
        )
        bias.node.replace_input_with(bias.index, _matmul(nodes, _with_ones(nodes, part), up))
        drop(bias.value)


def _side_by_side(deltas: Sequence[LowRank | None], ranks: Sequence[int]) -> Float64:
    """Return A^T of one task's low ranks [in, sum of ranks], each in its columns."""
    width = next(delta.in_features for delta in deltas if delta is not None)
    parts = np.zeros((width, sum(ranks)))
    for delta, start in zip(deltas, np.cumsum([0, *ranks[:-1]]), strict=True):
        if delta is not None:
            a = read(delta.A)
            parts[:, start : start + len(a)] = a.T
    return parts


def _with_bias(delta: LowRank | None, bias: ir.TensorProtocol, rank: int) -> Float64:
    """Return B^T of one task's low rank [rank, out], and the bias as one more row."""
    last = bias.numpy().astype(np.float64)
    rows = np.zeros((rank + 1, len(last)))
    if delta is not None:
        b = read(delta.B)
        rows[: b.shape[1]] = b.T
    rows[rank] = last
    return rows


def _with_ones(nodes: BranchNodes, x: ir.Value) -> ir.Value:
    """Return x [batch, sequence, k] with a column of ones behind it."""
    pads = nodes.numbers(0, 0, 0, 0, 0, 1)
    y = nodes.op("Pad", x, pads, constant(nodes.graph, np.array(1.0, np.float32)))
    y.shape = _as_wide(x, _features(x) + 1)
    return y


def _transposed(tensor: LazyTensor | None) -> Float64:
    return np.zeros((0, 0)) if tensor is None else read(tensor).T


def _features(value: ir.Value) -> int:
    assert value.shape is not None
    size = value.shape[-1]
    assert isinstance(size, int)
    return size


def _times(nodes: BranchNodes, x: ir.Value, matrices: ir.Value) -> ir.Value:
    """Return each row of x times its matrix [batch, in, out]: [batch, sequence, out]."""
    if nodes.leading == 1:
        rows = nodes.op("Unsqueeze", x, nodes.numbers(1))
        assert x.shape is not None
        rows.shape = ir.Shape([x.shape[0], 1, x.shape[1]])
        x = rows
    return _matmul(nodes, x, matrices)


def _matmul(nodes: BranchNodes, x: ir.Value, matrices: ir.Value) -> ir.Value:
    y = nodes.op("MatMul", x, matrices)
    y.shape = _as_wide(x, _features(matrices))
    return y


def _as_wide(x: ir.Value, features: int) -> ir.Shape:
    """Return the shape of x with other features: passes that follow look at shapes."""
    assert x.shape is not None
    return ir.Shape([*x.shape[:-1], features])


def _unrolled(nodes: BranchNodes, y: ir.Value) -> ir.Value:
    """Return y [batch, sequence, out] with the axes of the linear's own output."""
    return nodes.op("Squeeze", y, nodes.numbers(1)) if nodes.leading == 1 else y


def _replace_parameter(
    graph: ir.Graph, name: str, tensors: Sequence[LazyTensor], stacks: _Stacks
) -> None:
    """Let every reader of a parameter have that of each row's task."""
    value = graph.initializers[name]
    parts = [functools.partial(_transposed, tensor) for tensor in tensors]
    path = name.rpartition(".")[0]
    applied = calls(graph, [path])
    if name == f"{path}.weight":
        for call in applied:
            _check_rows(call)
            _replace_linear(call, parts, stacks)
    elif name == f"{path}.bias":
        for call in applied:
            _replace_bias(call, value, parts, stacks)
    if value.uses():
        raise CheckpointError(
            f"each task has its own {name}, which is neither weight nor bias of a linear",
            expected="heads of linears, for several tasks in one engine",
            fix="export each task by itself",
        )
    drop(value)


def _replace_linear(call: Call, parts: Sequence[Callable[[], Float64]], stacks: _Stacks) -> None:
    nodes = BranchNodes(call)
    shape = (_features(call.x), _features(call.y))
    weight = stacks.rows(nodes, f"{call.path}{STACKED}weight", shape, parts)
    y = _unrolled(nodes, _times(nodes, call.x, weight))
    if call.node.op_type == "Gemm" and len(call.node.inputs) > 2:
        bias = call.node.inputs[2]
        assert bias is not None
        y = nodes.op("Add", y, bias)
    old = call.y
    replace(old, y)
    drop(old)


def _replace_bias(
    call: Call, bias: ir.Value, parts: Sequence[Callable[[], Float64]], stacks: _Stacks
) -> None:
    nodes = BranchNodes(call)
    rows = stacks.rows(nodes, f"{call.path}{STACKED}bias", (_features(call.y),), parts)
    if nodes.leading == 2:
        rows = nodes.op("Unsqueeze", rows, nodes.numbers(1))
    for node, index in tuple(bias.uses()):
        if node is call.node or (node.op_type == "Add" and call.y in node.inputs):
            node.replace_input_with(index, rows)
