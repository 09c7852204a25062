"""Linears under a route that no input changes: their branches go into their weight."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from eptc.errors import InternalError
from eptc.ir import Adapter, Constant, InputRouter, Routed
from eptc.ir.folding import folded
from eptc.lower.calls import Call, set_weight
from eptc.lower.constants import constant_value
from eptc.lower.weights import bound
from eptc.tensors import LazyTensor

__all__ = ["Gates", "constant_gates", "merge"]

Gates = tuple[float, ...]


def constant_gates(router: InputRouter, call: Call) -> Gates | None:
    """Return the gates that a router's call gives whatever the input; None where it has others.

    Found by what the call's input is made of, whichever model it is: DeBERTa projects its table of
    positions with the linear that projects the text.
    """
    x = constant_value(call.x)
    if x is None:
        return None
    gates = router.gates(x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x)
    return tuple(gates.ravel().tolist()) if gates.size == router.num_experts else None


def merge(
    fixed: Sequence[tuple[Call, Gates]],
    found: Sequence[Call],
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, LazyTensor],
    dtype: str | None,
) -> dict[str, Gates]:
    """Give executions under constant gates a weight with the branches in it, in place.

    Where every execution of a linear is under the same gates its weight itself is replaced, else
    the execution gets a weight of its own, `<linear>.merged.weight`. Each is computed when it is
    written (`eptc.ir.folding`).

    Args:
        fixed: executions and their gates.
        found: all executions of adapted linears.
        adapters: by the path of their linear.
        weights: the base's by parameter name.
        dtype: type of the merged weights; None: that of the base's.

    Returns:
        The gates of the linears whose own weight was replaced, by path.
    """
    whole: dict[str, Gates] = {}
    executions = collections.Counter(call.path for call in found)
    alike = collections.Counter((call.path, gates) for call, gates in fixed)
    for call, gates in fixed:
        adapter = adapters[call.path]
        base = weights[adapter.parameter]
        tensor = folded(base, _constant(adapter, gates), dtype or base.dtype)
        if alike[call.path, gates] == executions[call.path]:
            call.weight.const_value = bound(tensor, call.weight.name)
            whole[call.path] = gates
            continue
        number = sorted({g for c, g in fixed if c.path == call.path}).index(gates)
        name = f"{call.path}.merged{f'.{number}' if number else ''}.weight"
        set_weight(call, _initializer(call, name, tensor))
    return whole


def _initializer(call: Call, name: str, tensor: LazyTensor) -> ir.Value:
    graph = call.node.graph
    assert isinstance(graph, ir.Graph)
    if (known := graph.initializers.get(name)) is not None:
        return known
    value = ir.Value(name=name, const_value=bound(tensor, name))
    value.type, value.shape = call.weight.type, call.weight.shape
    graph.register_initializer(value)
    return value


def _constant(adapter: Adapter, gates: Gates) -> Adapter:
    """Return an adapter with its gates' values in their place."""
    branches = []
    for branch in adapter.branches:
        if not isinstance(branch.gate, Routed):
            raise InternalError(f"{adapter.target} has a gate that reads no input")
        value = gates[branch.gate.expert]
        if value != 0.0:  # NaN stays: it is found when the weight is computed
            branches.append(dataclasses.replace(branch, gate=Constant(value)))
    return dataclasses.replace(adapter, branches=tuple(branches))
