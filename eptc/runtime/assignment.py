"""Which provider runs which node of a session, and whether that is what was asked for.

ONNX Runtime puts a node that a provider has no kernel for on the CPU without a word: the session
still names the provider, and answers at the speed of its slowest part. Two things may stand on
the CPU all the same: what computes shapes, which it puts there on purpose, and its own copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from eptc.errors import OptionError
from eptc.runtime.ort_errors import ort_errors
from eptc.runtime.providers import CPU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime.providers import Request

__all__ = ["RECORD", "Assigned", "assigned", "check_assignment", "fallback"]

# The session's option without which it does not say where nodes are. ONNX Runtime before 1.24
# does not know it.
RECORD: Final = ("session.record_ep_graph_assignment_info", "1")

# What sizes are computed with. The CUDA provider has kernels for all of them, and leaves those
# to the CPU that work on shapes; anything else on the CPU is there because it has none.
_OF_SHAPES: Final = frozenset({
    "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal",
    "Expand", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual",
    "Max", "MemcpyFromHost", "MemcpyToHost", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range",
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice",
    "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
_NAMED: Final = 3


class Assigned(NamedTuple):
    """A node and the provider that runs it."""

    provider: str
    op_type: str
    name: str


def assigned(session: Any) -> list[Assigned] | None:
    """Return where each node of a session runs; None where ONNX Runtime does not say.

    Args:
        session: opened with the option `RECORD`.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    try:
        parts = ask()
    except ort_errors():
        return None
    return [
        Assigned(part.ep_name, node.op_type, node.name)
        for part in parts
        for node in part.get_nodes()
    ]


def fallback(nodes: Sequence[Assigned], wanted: Sequence[str]) -> str | None:
    """Return what fell back to a provider that was not meant to compute, or None.

    Args:
        nodes: where each node runs.
        wanted: the providers that were asked for, in order.
    """
    if wanted[0] == CPU:
        return None
    fallen = [n for n in nodes if n.provider == CPU and n.op_type not in _OF_SHAPES]
    if fallen:
        kinds = sorted({node.op_type for node in fallen})
        first = ", ".join(node.name or node.op_type for node in fallen[:_NAMED])
        return f"{len(fallen)} of {len(nodes)} nodes run on the CPU: {', '.join(kinds)} ({first})"
    if nodes and not any(node.provider == wanted[0] for node in nodes):
        return f"none of {len(nodes)} nodes runs on it"
    return None


def check_assignment(session: Any, requests: Sequence[Request]) -> None:
    """Refuse a session that computes on another provider than the first that was asked for.

    Raises:
        OptionError: nodes fell back to the CPU, or ONNX Runtime does not say whether any did.
    """
    wanted = [name for name, _ in requests]
    if wanted[0] == CPU:
        return
    allow = "pass allow_fallback=True (--allow-fallback) to take it as it is"
    nodes = assigned(session)
    if nodes is None:
        raise OptionError(
            f"this ONNX Runtime does not say which nodes {wanted[0]} runs",
            expected="ONNX Runtime 1.24 or newer, whose sessions say so",
            fix=f"upgrade onnxruntime-gpu, or {allow}",
        )
    if reason := fallback(nodes, wanted):
        raise OptionError(
            f"{wanted[0]} does not run the whole graph: {reason}",
            expected=f"every node on {wanted[0]}, but for the arithmetic of shapes",
            fix="export for it (--optimize-for cuda, and a precision that it has kernels for), or "
            + allow,
        )
