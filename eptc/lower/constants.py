"""Values of a bound graph that no input changes, computed now."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.ir import Float64

__all__ = ["constant_value"]


def constant_value(value: ir.Value) -> Float64 | None:
    """Return a value in float64 where it depends on weights and constants alone, else None.

    Weights are widened and each operator is ONNX's own reference in numpy: sums and elementary
    functions of float64, whose last bits later roundings to float32 do not see.

    Args:
        value: of a main graph; the weights it depends on are bound, and read.

    Raises:
        InternalError: one of them is not.
    """
    found = _ancestors(value)
    if found is None:
        return None
    nodes, leaves = found
    if missing := [leaf.name for leaf in leaves if leaf.const_value is None]:
        raise InternalError(f"{missing[0]} has no data yet")
    if not nodes:
        return np.asarray(_widened(value), np.float64)
    from onnx.reference import ReferenceEvaluator

    graph = nodes[0].graph
    assert isinstance(graph, ir.Graph)
    part = ir.convenience.extract(graph, [], [value])
    for initializer in part.initializers.values():
        initializer.const_value = ir.tensor(_widened(initializer), name=initializer.name)
        # A type may be shared with the graph it was extracted from: never changed in place.
        initializer.type = ir.TensorType(initializer.const_value.dtype)
    for item in (*part.outputs, *(output for node in part for output in node.outputs)):
        item.type = ir.TensorType(ir.DataType.DOUBLE)
    model = ir.Model(part, ir_version=10)
    (result,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {})
    return np.asarray(result, np.float64)


def _ancestors(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]] | None:
    """Return the nodes a value is made by, and the initializers they start from.

    None where one of them is an input: nearly every linear's, and found after a few steps.
    """
    nodes: dict[ir.Node, None] = {}
    leaves: dict[ir.Value, None] = {}
    open_values = [value]
    while open_values:
        item = open_values.pop()
        node = item.producer()
        if item.is_graph_input():
            return None
        if node is None:
            leaves[item] = None
        elif node not in nodes:
            nodes[node] = None
            open_values += [source for source in node.inputs if source is not None]
    return list(nodes), list(leaves)


def _widened(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Return an initializer's numbers, those of a floating-point type in float64."""
    assert value.const_value is not None
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = value.const_value.numpy()
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array
