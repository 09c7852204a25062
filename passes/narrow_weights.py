"""Store weights in the 16-bit type they came in."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from eptc.lower.weights import WeightTensor
from eptc.pass_base import Contract, GraphPass

__all__ = ["NarrowWeights"]

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class NarrowWeights(GraphPass):
    """Store weights in the 16-bit type they came in, and widen them where they are read.

    Before: y = MatMul(x, W)                     W [in, out] float32, widened from 16 bits
            e = Gather(E, ids)                   E [rows, width], likewise
    After:  y = MatMul(x, Cast(W16))             W16 [in, out]
            e = Cast(Gather(E16, ids))           the rows that are read, never the table

    Exact: widening 16 bits to float32 changes no number, and arithmetic stays in float32. One
    Cast serves all readers of a weight. Matrices only: biases and norms are small, and runtimes
    recognise them by their type. Main graph only. A weight that a caller can set or read is
    left alone.
    """

    name: ClassVar[str] = "narrow-weights"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Narrow every matrix that has a 16-bit form; return how many were."""
        narrowed = 0
        for weight in tuple(model.graph.initializers.values()):
            tensor = weight.const_value
            narrow = tensor.origin if isinstance(tensor, WeightTensor) else None
            if tensor is None or narrow is None or narrow.dtype not in _NARROW:
                continue
            if len(tensor.shape) < 2 or weight.is_graph_input() or weight.is_graph_output():
                continue
            if any(node.graph is not model.graph for node in weight.consumers()):
                continue
            _narrow(model.graph, weight, narrow)
            narrowed += 1
        return narrowed


def _narrow(graph: ir.Graph, weight: ir.Value, tensor: WeightTensor) -> None:
    uses = weight.uses()
    # A type of its own: copies of a graph share theirs.
    weight.const_value, weight.type = tensor, ir.TensorType(tensor.dtype)
    widened: ir.Value | None = None
    for node in sorted({use.node for use in uses}, key=_position(graph).__getitem__):
        if node.op_identifier() == ("", "Gather", "") and not node.outputs[0].is_graph_output():
            rows = node.outputs[0]
            rows.type = ir.TensorType(tensor.dtype)
            cast = _cast(rows, node, weight)
            graph.insert_after(node, cast)
            ir.convenience.replace_all_uses_with(rows, cast.outputs[0])
            cast.replace_input_with(0, rows)
            continue
        if widened is None:
            cast = _cast(weight, node, weight)
            graph.insert_before(node, cast)
            widened = cast.outputs[0]
        for use in uses:
            if use.node is node:
                node.replace_input_with(use.idx, widened)


def _position(graph: ir.Graph) -> dict[ir.Node, int]:
    return {node: number for number, node in enumerate(graph)}


def _cast(value: ir.Value, near: ir.Node, weight: ir.Value) -> ir.Node:
    """Return a Cast of `value` to float32 in the module of the node `near`."""
    module, slash, _ = (near.name or "").rpartition("/")
    # Unlike all others until names are made anew; what stands before the last / is the module.
    reader = str(near.outputs[0].name).replace("/", ".")
    name = f"{module}{slash}Cast.{weight.name}.{reader}"
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=name)
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = value.shape
    return cast
