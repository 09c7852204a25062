"""Put the branches that cannot be folded beside their linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from eptc.errors import CheckpointError, InternalError
from eptc.ir import Adapter, Delta, InputRouter
from eptc.lower.calls import Call, add_to, calls

__all__ = ["insert_branches"]

# Inserts a router before the linear whose input it reads. Returns its gates, 0 for experts not
# chosen: [batch, sequence, experts] for tokens, [batch, 1, experts] for rows, [1, 1, experts]
# for the batch.
LowerRouter = Callable[[InputRouter, Call], ir.Value]
# Inserts the branches of an adapter, all routed, before its linear. Returns their sum [..., out].
LowerBranches = Callable[[Adapter, ir.Value, Call], ir.Value]

ROUTERS: dict[type[InputRouter], LowerRouter] = {}
BRANCHES: dict[type[Delta], LowerBranches] = {}


def insert_branches(model: ir.Model, adapters: Mapping[str, Adapter]) -> int:
    """Insert every branch that is left beside its linear, in place.

    Before: y = MatMul(x, W^T)                   x [..., in], W [out, in]
    After:  y = MatMul(x, W^T) + sum_i scale_i * gate_i(x) * D_i x

    Args:
        model: a bound graph, as it was traced: its transposes are not folded yet.
        adapters: by the path of their linear; those without branches are done.

    Returns:
        How many executions of a linear got branches.

    Raises:
        CheckpointError: a linear comes before the one whose input its router reads.
    """
    left = {path: adapter for path, adapter in adapters.items() if adapter.branches}
    gates: dict[InputRouter, ir.Value] = {}
    found = calls(model.graph, left)
    for call in found:
        adapter = left[call.path]
        router = adapter.input_router
        if router is None:
            raise InternalError(f"the constant branches of {call.path} were not folded")
        if router.site in (None, call.path):
            gates[router] = ROUTERS[type(router)](router, call)
        if router not in gates:
            raise CheckpointError(
                f"{call.path} is executed before {router.site}, whose input the router reads",
                expected="a router that is executed before every linear it routes",
                fix="its answers depend on the call before, so that it cannot be compiled",
            )
        add_to(call, BRANCHES[type(adapter.branches[0].delta)](adapter, gates[router], call))
    return len(found)
