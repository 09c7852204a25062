"""Put the branches that cannot be folded beside their linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir

from eptc.errors import CheckpointError, InternalError
from eptc.ir import Adapter, CentroidRouter, Delta, InputRouter, Kronecker, TokenRouter, Tucker
from eptc.lower.calls import Call, add_to, calls
from eptc.lower.kronecker import mix_kronecker
from eptc.lower.merging import Gates, constant_gates, merge
from eptc.lower.token_router import lower_token_router
from eptc.lower.tucker import join_mixing, lower_centroids, lower_tucker
from eptc.tensors import LazyTensor

__all__ = ["insert_branches", "merged_gates", "routed_by"]

# Inserts a router before the linear whose input it reads. Returns its gates, 0 for experts not
# chosen: [batch, sequence, experts] for tokens, [batch, 1, experts] for rows, [1, 1, experts]
# for the batch.
LowerRouter = Callable[[InputRouter, Call], ir.Value]
# Inserts the branches of an adapter, all routed, before its linear. Returns their sum [..., out].
LowerBranches = Callable[[Adapter, ir.Value, Call], ir.Value]

ROUTERS: dict[type[InputRouter], LowerRouter] = {
    CentroidRouter: lower_centroids,
    TokenRouter: lower_token_router,
}
BRANCHES: dict[type[Delta], LowerBranches] = {Kronecker: mix_kronecker, Tucker: lower_tucker}

# In the metadata of a value of gates: the linears it routes, while the graph is in memory.
_ROUTED = "eptc.routed"
# In the metadata of a graph: the constant gates of the linears that have them in their weight.
_MERGED = "eptc.merged"


def routed_by(graph: ir.Graph) -> dict[str, list[str]]:
    """Return the names of the values that hold a linear's gates, by the linear's path."""
    found: dict[str, list[str]] = {}
    for node in graph:
        for value in node.outputs:
            for path in value.meta.get(_ROUTED, ()):
                found.setdefault(path, []).append(str(value.name))
    return found


def merged_gates(graph: ir.Graph) -> dict[str, Gates]:
    """Return the gates of the linears whose every execution has constant ones, by their path."""
    found: dict[str, Gates] = graph.meta.get(_MERGED, {})
    return dict(found)


def insert_branches(
    model: ir.Model,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, LazyTensor] = MappingProxyType({}),
    dtype: str | None = "float32",
) -> int:
    """Insert every branch that is left beside its linear, in place.

    Before: y = MatMul(x, W^T)                   x [..., in], W [out, in]
    After:  y = MatMul(x, W^T) + sum_i scale_i * gate_i(x) * D_i x

    Executions under a route that no input changes get a weight with the branches in it instead.

    Args:
        model: a bound graph, as it was traced: its transposes are not folded yet.
        adapters: by the path of their linear; those without branches are done.
        weights: the model's, by parameter name; those under constant routes must be there.
        dtype: type of weights that branches are folded into; None: the weight's own.

    Returns:
        How many executions of a linear got branches.

    Raises:
        CheckpointError: a linear comes before the one whose input its router reads, or has no
            rows where each row has its own route.
    """
    left = {path: adapter for path, adapter in adapters.items() if adapter.branches}
    routes: dict[InputRouter, ir.Value | Gates] = {}
    made: list[ir.Value] = []
    fixed: list[tuple[Call, Gates]] = []
    found = calls(model.graph, left)
    for call in found:
        adapter = left[call.path]
        router = adapter.input_router
        if router is None:
            raise InternalError(f"the constant branches of {call.path} were not folded")
        if router.site in (None, call.path):
            gates = constant_gates(router, call)
            if gates is None:
                made.append(ROUTERS[type(router)](router, call))
            routes[router] = made[-1] if gates is None else gates
        if router not in routes:
            raise CheckpointError(
                f"{call.path} is executed before {router.site}, whose input the router reads",
                expected="a router that is executed before every linear it routes",
                fix="its answers depend on the call before, so that it cannot be compiled",
            )
        route = routes[router]
        if isinstance(route, tuple):
            fixed.append((call, route))
            continue
        route.meta.setdefault(_ROUTED, []).append(call.path)
        _check_rows(router, call)
        add_to(call, BRANCHES[type(adapter.branches[0].delta)](adapter, route, call))
    for value in made:
        join_mixing(value)
    model.graph.meta[_MERGED] = merge(fixed, found, left, weights, dtype)
    return len(found)


def _check_rows(router: InputRouter, call: Call) -> None:
    """Refuse a route for each row where a linear is executed once for all of them."""
    assert call.x.shape is not None
    if router.unit == "row" and isinstance(call.x.shape[0], int):
        raise CheckpointError(
            f"{call.path} reads no row of the batch: its input is {call.x.name}, and each row has "
            "a route of its own",
            expected="one route for the batch, or adapters of linears that read each row",
            fix="give --routing exact; batch size 1 is the answer to a text alone",
        )
