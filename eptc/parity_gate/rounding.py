"""Where an engine rounds what it computes with to 8 bits, and the same without that.

Rounding a block's activations moves its state by more than many a fault does, so block by block
they first stay float32: what is compared are the weights and how they are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

__all__ = ["DYNAMIC", "rounds", "without_rounding"]

DYNAMIC = "DynamicQuantizeLinear"
# MatMulNBits: how many bits activations may be rounded to.
_LEVEL = "accuracy_level"


def rounds(nodes: Iterable[ir.Node]) -> bool:
    """Whether some nodes round activations to 8 bits, each time to what came."""
    return any(node.op_type == DYNAMIC or _LEVEL in node.attributes for node in nodes)


def without_rounding(graph: ir.Graph) -> None:
    """Keep activations in float32, in place.

    Before: q, s, z = DynamicQuantizeLinear(x)      q uint8
            y = MatMulInteger(q, W8, z)             y int32
    After:  q = x / s + z, y = (q - z) @ W8         all float32

    Scales and zero points are still those that each node reads, so that another activation's
    shows.
    """
    for node in tuple(graph):
        node.attributes.pop(_LEVEL, None)
        if node.op_type == DYNAMIC:
            whole, scale, zero = node.outputs
            readers = tuple(whole.uses())
            steps = ir.node("Div", [node.inputs[0], scale])
            single = ir.node("Cast", [zero], {"to": int(ir.DataType.FLOAT)})
            exact = ir.node("Add", [steps.outputs[0], single.outputs[0]])
            graph.insert_after(node, [steps, single, exact])
            for reader, index in readers:
                reader.replace_input_with(index, exact.outputs[0])
        elif node.op_type == "MatMulInteger":
            inputs = (*node.inputs, None, None)
            operands = [_shifted(node, inputs[i], inputs[i + 2]) for i in range(2)]
            product = _insert(node, "MatMul", *operands)
            ir.convenience.replace_all_uses_with(
                node.outputs[0], product, replace_graph_outputs=True
            )
            graph.remove(node, safe=True)


def _shifted(before: ir.Node, value: ir.Value | None, zero: ir.Value | None) -> ir.Value:
    """Return an operand less its zero point."""
    assert value is not None
    whole = _single(before, value)
    return whole if zero is None else _insert(before, "Sub", whole, _single(before, zero))


def _single(before: ir.Node, value: ir.Value) -> ir.Value:
    return _insert(before, "Cast", value, to=int(ir.DataType.FLOAT))


def _insert(before: ir.Node, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """Insert a node before another; return its output."""
    node = ir.node(op_type, inputs, attributes)
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, node)
    return node.outputs[0]
