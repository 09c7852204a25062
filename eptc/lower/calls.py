"""Where a traced graph applies its linears: what a branch reads, and where it is added."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from eptc.lower.edit import made_by, replace

__all__ = ["Call", "add_to", "calls", "set_weight"]

_WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True)
class Call:
    """One execution of a linear: y = MatMul(x, Transpose(W)), W the weight [out, in].

    Where x is a matrix it may be a Gemm that transposes W and adds the bias itself.

    Args:
        path: the linear.
        node: the MatMul, whose bias is added behind it, or the Gemm.
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
        """Its output [..., out], of a MatMul without the bias."""
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
    weight: ir.Value | None = None
    if node.op_identifier() == ("", "MatMul", ""):
        transpose = made_by(node.inputs[1], "Transpose")
        weight = None if transpose is None else transpose.inputs[0]
    elif node.op_identifier() == ("", "Gemm", "") and node.attributes.get_int("transB", 0) == 1:
        weight = node.inputs[1]
    named = weight is not None and weight.is_initializer() and str(weight.name).endswith(_WEIGHT)
    return weight if named else None


def add_to(call: Call, value: ir.Value) -> None:
    """Add what a branch gives [..., out] to a linear's output, in place."""
    y = call.y
    add = ir.node("Add", [y, value], name=f"{call.path}/branch/Total")
    graph = call.node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_after(call.node, add)
    replace(y, add.outputs[0])
    add.replace_input_with(0, y)
    if y.name is None:  # it was the graph's output
        y.name = f"{call.path}/branch/without"


def set_weight(call: Call, weight: ir.Value) -> None:
    """Let one execution of a linear use another weight [out, in], in place."""
    if call.node.op_type == "Gemm":
        call.node.replace_input_with(1, weight)
        return
    old = call.node.inputs[1]
    assert old is not None
    transpose = old.producer()
    graph = call.node.graph
    assert transpose is not None
    assert isinstance(graph, ir.Graph)
    own = ir.node(
        "Transpose", [weight], transpose.attributes, name=f"{call.path}/branch/Transpose"
    )
    own.outputs[0].name, own.outputs[0].type = None, weight.type
    own.outputs[0].shape = old.shape
    graph.insert_before(call.node, own)
    call.node.replace_input_with(1, own.outputs[0])
