"""One MatMul for projections of the same input."""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from eptc.lower.edit import constant, drop, insert, module, replace
from eptc.lower.weights import PACKED, WeightTensor, join
from eptc.pass_base import Contract, GraphPass

__all__ = ["PackProjections"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PackProjections(GraphPass):
    """One MatMul for projections of the same input.

    Before: q = MatMul(x, Wq); k = MatMul(x, Wk); v = MatMul(x, Wv)    W* [in, out*]
    After:  q, k, v = Split(MatMul(x, [Wq, Wk, Wv]), axis=-1)

    Queries, keys and values of an attention, gate and value of a feed-forward block: whatever
    one module or its direct children project from the same input. The packed weight is called
    after its parts, `Wq+Wk+Wv`, and is put together when it is written. Exact: every
    output is the same sum. Main graph only. A MatMul is left
    alone, its reason logged at DEBUG, where its weight is not bound, not a matrix, of another
    type or kept otherwise than its neighbour's, read elsewhere, or seen by a caller.
    """

    name: ClassVar[str] = "pack-projections"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Pack every group of projections; return how many groups were."""
        groups: dict[tuple[object, ...], list[ir.Node]] = collections.defaultdict(list)
        for node in model.graph:
            if node.op_identifier() != ("", "MatMul", ""):
                continue
            weight = _weight(node)
            if isinstance(weight, str):
                logger.debug("%s: left %s alone: %s", self.name, node.name, weight)
                continue
            parent = module(node).rpartition(".")[0]
            groups[node.inputs[0], parent, weight.dtype, _rows(weight)].append(node)
        packed = [nodes for nodes in groups.values() if len(nodes) > 1]
        for nodes in packed:
            _pack(nodes, model.graph)
        return len(packed)


def _weight(node: ir.Node) -> ir.Value | str:
    """Return the weight of a projection, or why it is none that can be packed."""
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return "its right side is no weight"
    tensor = weight.const_value
    if not isinstance(tensor, WeightTensor) or len(tensor.shape) != 2:
        return "its weight has no data yet, or is no matrix"
    if len(weight.uses()) > 1:
        return "its weight is read elsewhere"
    if weight.is_graph_input() or weight.is_graph_output() or node.outputs[0].is_graph_output():
        return "a caller can set or read it"
    return weight


def _rows(weight: ir.Value) -> int:
    assert weight.const_value is not None
    rows: int = weight.const_value.shape.numpy()[0]
    return rows


def _pack(nodes: list[ir.Node], graph: ir.Graph) -> None:
    """Put one MatMul and a Split in the place of several."""
    first = nodes[0]
    weights = [weight for node in nodes if isinstance(weight := _weight(node), ir.Value)]
    tensors = [weight.const_value for weight in weights if weight.const_value is not None]
    name = PACKED.join(str(weight.name) for weight in weights)
    tensor = join(tensors, axis=1, name=name)
    packed = ir.Value(name=tensor.name, const_value=tensor)
    packed.dtype, packed.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
    graph.register_initializer(packed)

    path = module(first).rpartition(".")[0]
    product = insert(first, "MatMul", [first.inputs[0], packed], path=path).outputs[0]
    sizes = constant(graph, np.array([t.shape.numpy()[1] for t in tensors], np.int64))
    split = insert(first, "Split", [product, sizes], {"axis": -1}, path=path, outputs=len(nodes))
    shape = first.outputs[0].shape
    if shape is not None:
        product.shape = ir.Shape([*shape[:-1], tensor.shape.numpy()[1]])
    for node, value in zip(nodes, split.outputs, strict=True):
        replace(node.outputs[0], value)
        drop(node.outputs[0])
