"""One graph for any task: its factors and its head are optional inputs.

::

    y = x W^T + (x A) B        inputs `<path>.A` [in, rank] and `<path>.B` [rank, out]

The convention of ONNX Runtime's adapters: an input with an initializer need not be fed. Rank 0
adds nothing, so that a graph that is fed no task is the base; a head has no output then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from eptc.lower.branch_nodes import BranchNodes
from eptc.lower.calls import add_to, calls
from eptc.runtime.pack_spec import LABELS
from eptc.runtime.pack_tensors import factor_names

__all__ = ["declare_optional", "insert_factors", "insert_heads"]

Sizes = Sequence[int | str]


def insert_factors(model: ir.Model, linears: Mapping[str, tuple[int, int]]) -> set[str]:
    """Add (x A) B to every execution of some linears, in place.

    Args:
        model: a graph as it was traced: its transposes are not folded yet.
        linears: [out, in] by path.

    Returns:
        The linears that the graph applies.
    """
    graph, inputs = model.graph, dict[str, ir.Value]()
    for call in calls(graph, linears):
        nodes, value = BranchNodes(call), call.x
        for name, shape in _factor_shapes(call.path, linears[call.path]):
            if name not in inputs:
                inputs[name] = _input(name, shape)
                graph.inputs.append(inputs[name])
            value = nodes.op("MatMul", value, inputs[name])
        add_to(call, value)
    return {path for path in linears if factor_names(path)[0] in inputs}


def insert_heads(model: ir.Model, heads: Mapping[str, Sizes]) -> set[str]:
    """Make inputs of some parameters, in place, and how many outputs there are a size by name.

    Args:
        model: a graph as it was traced, not bound yet.
        heads: their shapes by name; `LABELS` for what differs from task to task.

    Returns:
        Those that the graph reads.
    """
    graph, found = model.graph, set[str]()
    for name, shape in heads.items():
        parameter = graph.initializers.get(name)
        if parameter is None:
            continue
        del graph.initializers[name]
        value = _input(name, shape)
        ir.convenience.replace_all_uses_with(parameter, value)
        graph.inputs.append(value)
        found.add(name)
        if LABELS in shape:
            _forget_sizes(value)
    return found


def declare_optional(
    model: ir.Model, linears: Mapping[str, tuple[int, int]], heads: Mapping[str, Sizes]
) -> None:
    """Make inputs of tasks optional, in place, those that another graph of the engine reads too.

    So every graph takes every task's adapter as it is. They stand last, sorted.

    Args:
        model: a graph that no pass will change any more.
        linears: [out, in] by path.
        heads: shapes by name.
    """
    graph = model.graph
    shapes: dict[str, Sizes] = dict(heads)
    for path, sizes in linears.items():
        shapes |= dict(_factor_shapes(path, sizes))
    known = {str(value.name): value for value in graph.inputs if value.name in shapes}
    for value in known.values():
        graph.inputs.remove(value)
    for name, shape in sorted(shapes.items()):
        value = known.get(name) or _input(name, shape)
        default = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
        value.const_value = ir.tensor(default, name=name)
        graph.inputs.append(value)
        graph.register_initializer(value)


def _factor_shapes(path: str, sizes: tuple[int, int]) -> Iterator[tuple[str, Sizes]]:
    out, columns = sizes
    rank = f"{path}.rank"
    yield from zip(factor_names(path), ((columns, rank), (rank, out)), strict=True)


def _input(name: str, shape: Sizes) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def _forget_sizes(value: ir.Value) -> None:
    """Forget what was inferred of the values that a parameter makes; outputs get a name for it."""
    for node in value.consumers():
        for output in node.outputs:
            if output.is_graph_output():
                assert output.shape is not None
                output.shape = ir.Shape([*output.shape[:-1], LABELS])
            elif output.shape is not None:
                output.shape = None
                _forget_sizes(output)
