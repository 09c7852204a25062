"""Which nodes around 8-bit products share a scale, and so a type."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from eptc.lower.edit import made_by

__all__ = ["is_scaling", "quantized_from", "sharing"]

_Q, _DQ = "QuantizeLinear", "DequantizeLinear"


def is_scaling(node: ir.Node) -> bool:
    """Whether a node is QuantizeLinear or DequantizeLinear."""
    return not node.domain and node.op_type in (_Q, _DQ)


def quantized_from(value: ir.Value) -> ir.Value:
    """Return the activation that was quantized and back, or the 8-bit weight; else the value."""
    turned = made_by(value, "Transpose")
    source = value if turned is None else turned.inputs[0]
    back = made_by(source, _DQ)
    if source is None or back is None or back.inputs[0] is None:
        return value
    there = made_by(back.inputs[0], _Q)
    found = back.inputs[0] if there is None else there.inputs[0]
    return value if found is None else found


def sharing(graph: ir.Graph) -> list[list[ir.Node]]:
    """Return the nodes of the main graph that have to compute in one type, group by group.

    A value is dequantized with the scale it was quantized by, and nothing stands between
    DequantizeLinear and the product that reads it, or TensorRT would not make one kernel of them.
    """
    groups, seen = [], set[ir.Node]()
    for first in filter(is_scaling, graph):
        if first in seen:
            continue
        group, waiting = [], [first]
        seen.add(first)
        while waiting:
            node = waiting.pop()
            group.append(node)
            new = [other for other in dict.fromkeys(_beside(node)) if other not in seen]
            seen.update(new)
            waiting += new
        groups.append(group)
    return groups


def _beside(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes that share a scale, or an operand, with one of a group."""
    if is_scaling(node) or node.op_type == "Transpose":
        yield from node.outputs[0].consumers()
    # What QuantizeLinear reads may have any type; zero points are shared by all.
    for value in node.inputs[: 0 if node.op_type == _Q else 2]:
        maker = None if value is None else value.producer()
        if value is not None and node.op_type == _DQ and value.is_initializer() and value.shape:
            yield from value.consumers()  # a weight, or the scales of its channels
        elif maker is not None and (is_scaling(maker) or _turns_weight(maker)):
            yield maker


def _turns_weight(node: ir.Node) -> bool:
    return node.op_identifier() == ("", "Transpose", "") and bool(made_by(node.inputs[0], _DQ))
