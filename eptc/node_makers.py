"""Which pass made a node of a graph: what a message about the node can name."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir

__all__ = ["maker", "sign"]

_KEY = "eptc.maker"
_TRACE = "the trace"


def sign(graphs: Mapping[str, onnx_ir.Model], label: str = _TRACE) -> None:
    """Write on nodes that are new, or have another operator than before, who made them.

    It is kept beside the graph, and in no file.

    Args:
        graphs: by name.
        label: who ran last.
    """
    for graph in graphs.values():
        for node in graph.graph.all_nodes():
            operator = node.op_identifier()
            if node.meta.get(_KEY, (None,))[0] != operator:
                node.meta[_KEY] = (operator, label)


def maker(node: onnx_ir.Node) -> str:
    """Return who made a node: `the trace`, or the pass."""
    label: str = node.meta.get(_KEY, (None, _TRACE))[1]
    return label
