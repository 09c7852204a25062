"""Nodes that both int8 passes put around integer weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from eptc.lower.edit import constant, drop, insert, replace
from eptc.lower.int8 import integers
from eptc.lower.quantizable import Product, Quantizable

__all__ = ["add_bias", "by_position", "node", "read_rows", "register_scale", "store", "turned"]


def store(site: Quantizable, graph: ir.Graph, *, largest: int) -> ir.Value:
    """Make a weight integers, in place, and return the new initializer with its scale."""
    weight = site.weight
    assert weight.const_value is not None
    whole, scale = integers(weight.const_value, site.axis, largest=largest)
    # A type of its own: copies of a graph share theirs.
    weight.const_value, weight.type = whole, ir.TensorType(ir.DataType.INT8)
    return register_scale(scale, graph)


def register_scale(scale: ir.TensorProtocol, graph: ir.Graph) -> ir.Value:
    """Return the new initializer with a weight's scale."""
    added = ir.Value(name=scale.name, const_value=scale)
    added.type, added.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(scale.shape.numpy())
    graph.register_initializer(added)
    return added


def by_position(
    sites: Sequence[Quantizable], graph: ir.Graph
) -> list[tuple[Quantizable, Product]]:
    """Return every product in the order of the graph."""
    position = {node: number for number, node in enumerate(graph)}
    pairs = [(site, product) for site in sites for product in site.products]
    return sorted(pairs, key=lambda pair: position[pair[1].node])


def node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    types: Sequence[ir.DataType],
    attributes: dict[str, Any] | None = None,
) -> Sequence[ir.Value]:
    """Insert a node before another; return its outputs, which have these types."""
    outputs = insert(before, op_type, inputs, attributes, outputs=len(types)).outputs
    for value, dtype in zip(outputs, types, strict=True):
        value.type = ir.TensorType(dtype)
    return outputs


def turned(site: Quantizable, product: Product) -> ir.Value:
    """Return the integers of a weight as a product reads them.

    A Transpose of an initializer is computed once, when a session loads the graph.
    """
    if not product.transposed:
        return site.weight
    swap = {"perm": [1, 0]}
    return node(product.node, "Transpose", [site.weight], [ir.DataType.INT8], swap)[0]


def add_bias(product: Product, result: ir.Value) -> ir.Value:
    """Put a result, and what a Gemm adds to it, in the place of a product; return it."""
    if product.bias is not None:
        result = node(product.node, "Add", [result, product.bias], [ir.DataType.FLOAT])[0]
    old = product.node.outputs[0]
    replace(old, result)
    drop(old)
    return result


def read_rows(site: Quantizable, scale: ir.Value, graph: ir.Graph) -> None:
    """Let every Gather of a table read integers, and scale the rows it reads.

    Before: e = Gather(E, ids)                                 E [rows, width] float32
    After:  e = Cast(Gather(E8, ids)) * Gather(scale, ids)     the rows, never the table
    """
    for gather in site.gathers:
        ids = gather.inputs[1]
        rows = node(gather, "Gather", [site.weight, ids], [ir.DataType.INT8], {"axis": 0})
        single = {"to": int(ir.DataType.FLOAT)}
        whole = node(gather, "Cast", rows, [ir.DataType.FLOAT], single)[0]
        steps = node(gather, "Gather", [scale, ids], [ir.DataType.FLOAT], {"axis": 0})[0]
        last = constant(graph, np.array([-1], np.int64))
        column = node(gather, "Unsqueeze", [steps, last], [ir.DataType.FLOAT])[0]
        read = node(gather, "Mul", [whole, column], [ir.DataType.FLOAT])[0]
        old = gather.outputs[0]
        replace(old, read)
        drop(old)
