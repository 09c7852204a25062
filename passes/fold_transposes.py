"""Store a weight in the layout that its readers transpose it to."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from eptc.lower.weights import derive
from eptc.pass_base import Contract, GraphPass
from eptc.tensors import Array

__all__ = ["FoldTransposes"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FoldTransposes(GraphPass):
    """Store a weight in the layout that its readers transpose it to.

    Before: y = MatMul(x, Transpose(W))    x [..., in], W [out, in]
    After:  y = MatMul(x, W)               W [in, out], the transposed numbers, same name

    Exact: numbers only move, when the weight is written. Main graph only. A weight is left
    alone, its reason logged at DEBUG, where it is not bound, a caller can set or read it or
    the result, or a reader wants it in another layout (an embedding that is also the head).
    """

    name: ClassVar[str] = "fold-transposes"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Fold every weight that is only read transposed; return how many were."""
        folded = 0
        for weight in tuple(model.graph.initializers.values()):
            readers = [node for node, _ in weight.uses()]
            if not any(_is_transpose(node) for node in readers):
                continue
            if reason := self._fold(weight, readers, model.graph):
                logger.debug("%s: left %s alone: %s", self.name, weight.name, reason)
            else:
                folded += 1
        return folded

    def _fold(self, weight: ir.Value, readers: list[ir.Node], graph: ir.Graph) -> str | None:
        """Fold one weight; return why not, or None where it was folded."""
        tensor = weight.const_value
        if tensor is None:
            return "it has no data yet"
        if weight.is_graph_input() or weight.is_graph_output():
            return "a caller can set or read it"
        if not all(_is_transpose(node) for node in readers):
            return "it is also read as it is"
        if any(node.graph is not graph for node in readers):
            return "a subgraph reads it"
        if any(node.outputs[0].is_graph_output() for node in readers):
            return "a caller can read the result"
        layouts = {_permutation(node, len(tensor.shape)) for node in readers}
        if len(layouts) > 1:
            return f"it is read in {len(layouts)} layouts"

        (permutation,) = layouts
        shape = tuple(tensor.shape.numpy()[axis] for axis in permutation)

        def transpose(array: Array) -> Array:
            return np.transpose(array, permutation)

        weight.const_value = derive(
            tensor, ("transpose", permutation), transpose, shape=shape, moves=True
        )
        weight.shape = ir.Shape(shape)
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            graph.remove(node, safe=True)
        return None


def _is_transpose(node: ir.Node) -> bool:
    return node.op_identifier() == ("", "Transpose", "")


def _permutation(node: ir.Node, rank: int) -> tuple[int, ...]:
    permutation = node.attributes.get_ints("perm", None)
    return tuple(range(rank))[::-1] if permutation is None else tuple(permutation)
