"""What passes need to put new nodes into a graph."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from eptc.tensors import Array

__all__ = ["MICROSOFT", "constant", "drop", "insert", "made_by", "module", "replace"]

MICROSOFT = "com.microsoft"


def module(node: ir.Node) -> str:
    """Return the path of the module a node came from, as its name says; may be empty."""
    return (node.name or "").rpartition("/")[0]


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes a value if it is this standard operator, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_identifier() == ("", op_type, "") else None


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    *,
    path: str | None = None,
    domain: str = "",
    outputs: int = 1,
) -> ir.Node:
    """Insert a node before another.

    The node is called `<path>/<op_type>`, with a number where that is taken. The type of its
    values is that of its first input, their shape unknown.

    Args:
        before: the node that comes after it.
        op_type: operator.
        inputs: what it reads; None leaves an optional input out.
        attributes: its attributes.
        path: the module it belongs to; None: that of `before`.
        domain: the operator's domain; the model must import it.
        outputs: how many values it makes.
    """
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    path = module(before) if path is None else path
    base = f"{path}/{op_type}" if path else op_type
    taken = {node.name for node in graph}
    name = next(
        name for i in itertools.count() if (name := f"{base}_{i}" if i else base) not in taken
    )
    node = ir.node(
        op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name
    )
    kind = next((value.type for value in inputs if value is not None), None)
    for value in node.outputs:
        value.name, value.type = None, kind
    graph.insert_before(before, node)
    return node


def constant(graph: ir.Graph, array: Array) -> ir.Value:
    """Return an initializer with these few numbers; equal ones are registered once."""
    for value in graph.initializers.values():
        found = value.const_value
        if (
            str(value.name).startswith("constants.")
            and found is not None
            and found.dtype == ir.DataType.from_numpy(array.dtype)
            and found.shape.numpy() == array.shape
            and np.array_equal(found.numpy(), array)
        ):
            return value
    number = len(graph.initializers)
    while (name := f"constants.{number}") in graph.initializers:
        number += 1
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, callers included, read `new`, which takes type and shape."""
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output():
        old.name, new.name = None, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def drop(*values: ir.Value | None) -> None:
    """Remove the nodes that made these values, and what only they read, where nothing reads them.

    Initializers that nothing reads any more go too.
    """
    for value in values:
        if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer() and isinstance(value.graph, ir.Graph):
                del value.graph.initializers[str(value.name)]
        elif node.graph is not None and not any(
            output.uses() or output.is_graph_output() for output in node.outputs
        ):
            inputs = list(dict.fromkeys(node.inputs))
            node.graph.remove(node, safe=True)
            drop(*inputs)
