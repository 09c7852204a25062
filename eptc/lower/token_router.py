"""The gates of a router that reads each token: dense, without shapes that depend on the data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.ir import Float64, InputRouter, TokenRouter
from eptc.ir.numbers import read
from eptc.lower.branch_nodes import BranchNodes
from eptc.lower.calls import Call

__all__ = ["lower_token_router"]


def lower_token_router(router: InputRouter, call: Call) -> ir.Value:
    """Insert a router before its linear; return the gates [..., experts].

    TopK puts the lower index first where logits are equal. What it keeps is scattered over the
    experts: probabilities that are divided by their sum are the softmax of the kept logits alone,
    whose others are minus infinity.

    Args:
        router: a `TokenRouter` of a fixed task.
        call: the linear whose input it reads.
    """
    if not isinstance(router, TokenRouter) or router.reads_task:
        raise InternalError(f"{call.path} has no router that reads tokens alone")
    nodes = BranchNodes(call)
    logits = _logits(nodes, router)
    if router.top_k >= router.num_experts:
        gates = nodes.op("Softmax", logits, axis=-1)
        return nodes.op("Softmax", gates, axis=-1) if router.normalization == "softmax" else gates
    kept, experts = nodes.ops(
        "TopK",
        [logits, nodes.numbers(router.top_k)],
        [ir.DataType.FLOAT, ir.DataType.INT64],
        {"axis": -1},
    )
    if router.normalization == "sum":
        return nodes.op("Softmax", _scattered(nodes, logits, experts, kept, -np.inf), axis=-1)
    kept = nodes.op("GatherElements", nodes.op("Softmax", logits, axis=-1), experts, axis=-1)
    if router.normalization == "softmax":
        kept = nodes.op("Softmax", kept, axis=-1)
    return _scattered(nodes, logits, experts, kept, 0.0)


def _logits(nodes: BranchNodes, router: TokenRouter) -> ir.Value:
    """Return (W x + b) / temperature, the temperature folded into W and b."""
    path, temperature = nodes.call.path, router.temperature

    def columns() -> Float64:
        return read(router.weight).T / temperature

    shape = router.weight.shape[1], router.num_experts
    name = f"{path}.branch.router"
    logits = nodes.op("MatMul", nodes.call.x, nodes.weight(name, shape, columns, name))
    bias = router.bias
    if bias is None:
        return logits
    name = f"{path}.branch.router_bias"
    added = nodes.weight(name, shape[1:], lambda: read(bias) / temperature, name)
    return nodes.op("Add", logits, added)


def _scattered(
    nodes: BranchNodes, like: ir.Value, places: ir.Value, values: ir.Value, rest: float
) -> ir.Value:
    """Return values at some places of the last axis, and `rest` everywhere else."""
    shape = nodes.op("Shape", like, dtype=ir.DataType.INT64)
    filled = nodes.op("ConstantOfShape", shape, value=ir.tensor(np.array([rest], np.float32)))
    return nodes.op("ScatterElements", filled, places, values, axis=-1)
