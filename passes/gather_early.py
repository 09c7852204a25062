"""Compute a position only where it is read."""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from eptc.lower.edit import constant, insert
from eptc.pass_base import Contract, GraphPass

__all__ = ["GatherEarly"]

logger = logging.getLogger(__name__)

_ELEMENTWISE = frozenset(
    {"Add", "Cast", "Div", "Erf", "Gelu", "Mul", "Neg", "Relu", "Sigmoid", "Sub", "Tanh"}
)

# What reads one position of which input: by node, the axis that holds it in each input.
Narrow = dict[ir.Node, list[int | None]]


@dataclasses.dataclass(frozen=True)
class GatherEarly(GraphPass):
    """Compute a position only where it is read.

    Before: y = Gather(LayerNormalization(MatMul(x, W)), i, axis=1)    x [batch, n, in]
    After:  y = Gather(LayerNormalization(MatMul(Gather(x, [i], axis=1), W)), 0, axis=1)

    A classifier reads one token of the last layer: that layer's queries, its output and its
    feed-forward block are computed for that token alone, keys and values for all of them.
    Exact: each position is computed from the same numbers as before. Main graph only. A Gather
    is left alone, its reason logged at DEBUG, where its index is no constant, where shapes are
    unknown, or where no MatMul would become smaller.
    """

    name: ClassVar[str] = "gather-early"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Move every such Gather up; return how many were."""
        moved = 0
        for node in tuple(model.graph):
            if node.op_identifier() != ("", "Gather", ""):
                continue
            if reason := _move(node, model.graph):
                logger.debug("%s: left %s alone: %s", self.name, node.name, reason)
            else:
                moved += 1
        return moved


def _move(gather: ir.Node, graph: ir.Graph) -> str | None:
    """Move one Gather up; return why not, or None where it was moved."""
    data, index = gather.inputs
    assert data is not None
    assert index is not None
    if index.const_value is None or index.const_value.shape.numpy() != ():
        return "its index is not one constant"
    if data.shape is None or data.producer() is None:
        return "what it reads is not computed, or has no known shape"
    axis = gather.attributes.get_int("axis", 0) % len(data.shape)
    if data.shape[axis] == 1:
        return "there is only one position"
    narrow, axes = _narrow(gather, data, axis, graph)
    if not any(node.op_type == "MatMul" for node in narrow):
        return "no MatMul would become smaller"

    position = constant(graph, np.array([int(index.const_value.numpy())], np.int64))
    gathered: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in reversed(narrow):
        for number, at in enumerate(narrow[node]):
            value = node.inputs[number]
            if at is None or value is None or value in axes:
                continue
            if (value, at) not in gathered:
                early = insert(node, "Gather", [value, position], {"axis": at}).outputs[0]
                early.shape = _one(value, at)
                gathered[value, at] = early
            node.replace_input_with(number, gathered[value, at])
    for value, at in axes.items():
        value.shape = _one(value, at)
    gather.replace_input_with(1, constant(graph, np.array(0, np.int64)))
    return None


def _narrow(
    gather: ir.Node, data: ir.Value, axis: int, graph: ir.Graph
) -> tuple[Narrow, dict[ir.Value, int]]:
    """Return the nodes of which one position is enough, last one first, and their values' axes."""
    narrow: Narrow = {}
    axes: dict[ir.Value, int] = {}
    wanted: dict[ir.Value, list[int]] = collections.defaultdict(list, {data: [axis]})
    for node in reversed(graph):
        value = node.outputs[0]
        readers = len(value.uses()) + value.is_graph_output()
        if node is gather or len(wanted[value]) != readers or len(set(wanted[value])) != 1:
            continue  # A reader wants all of it, or this is below the Gather.
        at = wanted[value][0]
        inputs = _positions(node, at) if len(node.outputs) == 1 else None
        if inputs is None:
            continue
        narrow[node], axes[value] = inputs, at
        for source, source_axis in zip(node.inputs, inputs, strict=True):
            if source is not None and source_axis is not None:
                wanted[source].append(source_axis)
    return narrow, axes


def _positions(node: ir.Node, axis: int) -> list[int | None] | None:
    """Return the axis that holds the same position in each input, None where one has no such.

    None for the whole: the node mixes positions, or it is not known what it does.
    """
    shape = node.outputs[0].shape
    if shape is None or node.domain or any(v is None or v.shape is None for v in node.inputs):
        return None
    inputs = [value for value in node.inputs if value is not None]
    rest: list[int | None] = [None] * (len(inputs) - 1)
    if node.op_type in _ELEMENTWISE:
        return _aligned(inputs, shape, axis)
    if node.op_type == "LayerNormalization":
        first = node.attributes.get_int("axis", -1) % len(shape)
        return [axis, *rest] if axis < first else None
    if node.op_type == "Softmax":
        return [axis] if axis != node.attributes.get_int("axis", -1) % len(shape) else None
    if node.op_type == "Transpose":
        return [node.attributes.get_ints("perm", range(len(shape))[::-1])[axis]]
    if node.op_type == "Pad" and inputs[1].const_value is not None and len(inputs) == 3:
        pads = inputs[1].const_value.numpy()
        return [axis, *rest] if not pads[axis] and not pads[len(shape) + axis] else None
    if node.op_type == "MatMul":
        left = len(inputs[0].shape or ())
        return [left - 2, None] if axis == len(shape) - 2 and left >= 2 else None
    if node.op_type == "Reshape" and inputs[1].const_value is not None:
        sizes = inputs[1].const_value.numpy()[: axis + 1]
        kept = not sizes.any() and not node.attributes.get_int("allowzero", 0)
        return [axis, *rest] if kept else None
    return None


def _aligned(inputs: list[ir.Value], shape: ir.Shape, axis: int) -> list[int | None] | None:
    """Return `_positions` of a node that broadcasts; None where a size is not known."""
    found: list[int | None] = []
    for value in inputs:
        assert value.shape is not None
        at = axis - len(shape) + len(value.shape)
        size = value.shape[at] if at >= 0 else 1
        if size == 1:
            found.append(None)
        elif size == shape[axis] and (isinstance(size, int) or size.value is not None):
            found.append(at)
        else:
            return None
    return found


def _one(value: ir.Value, axis: int) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([1 if i == axis else n for i, n in enumerate(value.shape)])
