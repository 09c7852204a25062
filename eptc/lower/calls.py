"""Where a traced graph applies its linears: what a branch reads, and where it is added."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from eptc.lower.edit import made_by

__all__ = ["Call", "add_to", "calls"]

_WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True)
class Call:
    """One execution of a linear: y = MatMul(x, Transpose(W)), W the weight [out, in].

    Args:
        path: the linear.
        node: the MatMul; the bias is added behind it.
    """

    path: str
    node: ir.Node

    @property
    def x(self) -> ir.Value:
        """The linear's input [..., in]."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def y(self) -> ir.Value:
        """Its output without the bias [..., out]."""
        return self.node.outputs[0]

    @property
    def weight(self) -> ir.Value:
        """The initializer W [out, in]."""
        found = _weight(self.node)
        assert found is not None
        return found


def calls(graph: ir.Graph, paths: Collection[str]) -> list[Call]:
    """Return every execution of some linears in a graph whose transposes are not folded yet.

    Args:
        graph: as it was traced; its nodes are in the order of execution.
        paths: the linears; those that the graph does not apply are left out.
    """
    found = []
    for node in graph:
        weight = _weight(node)
        if weight is not None:
            path = str(weight.name).removesuffix(_WEIGHT)
            if path in paths:
                found.append(Call(path, node))
    return found


def _weight(node: ir.Node) -> ir.Value | None:
    """Return the weight [out, in] of a node that applies a linear; None where it is none."""
    if node.op_identifier() != ("", "MatMul", ""):
        return None
    transpose = made_by(node.inputs[1], "Transpose")
    weight = None if transpose is None else transpose.inputs[0]
    named = weight is not None and weight.is_initializer() and str(weight.name).endswith(_WEIGHT)
    return weight if named else None


def add_to(call: Call, value: ir.Value) -> None:
    """Add what a branch gives [..., out] to a linear's output, in place."""
    y = call.y
    add = ir.node("Add", [y, value], name=f"{call.path}/branch/Add")
    total = add.outputs[0]
    total.name, total.type, total.shape = None, y.type, y.shape
    readers = [(use.node, use.idx) for use in y.uses() if use.node is not add]
    graph = call.node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_after(call.node, add)
    for node, index in readers:
        node.replace_input_with(index, total)
