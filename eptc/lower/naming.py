"""Names of nodes and values after the module they come from."""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["CHOICE", "SCOPES", "chooses_experts", "module_path", "name_by_module"]

# Metadata of a traced node: the modules it was called in, outermost first.
SCOPES = "pkg.torch.onnx.name_scopes"
# Why they stay float32.
CHOICE = "it chooses experts: another may be chosen by a last bit"
# A router's, or a prompt site's, in the name of a weight or of a node.
_CHOOSES = re.compile(r"/router/|\.router\.|(^|\.)prompts[./]")
# The task model is an attribute of the traced module.
_ROOT = "model"


def chooses_experts(name: object) -> bool:
    """Whether a weight or a node, by its name, belongs to a router or to a prompt site.

    They stay float32: a small error there can choose another expert.
    """
    return _CHOOSES.search(str(name)) is not None


def name_by_module(graph: ir.Graph) -> None:
    """Name nodes `<module path>/<operator>[_<n>]`, their values alike, constants by number.

    What the exporter calls things depends on what the process did before; the modules, the
    operators and their order do not. Interface and weights keep their names.
    """
    used: collections.Counter[str] = collections.Counter()
    module = ""
    for node in graph:
        module = module_path(node, module)
        base = f"{module}/{node.op_type}" if module else node.op_type
        node.name = f"{base}_{used[base]}" if used[base] else base
        used[base] += 1
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{index}" if index else node.name
    _order_initializers(graph)


def module_path(node: ir.Node, previous: str = "") -> str:
    """Return the path of a traced node's module; `previous` where the node does not know it."""
    if SCOPES not in node.metadata_props:
        return previous
    scopes = ast.literal_eval(node.metadata_props[SCOPES])
    path: str = scopes[-2] if len(scopes) > 1 else ""
    if path == _ROOT or not path.startswith(f"{_ROOT}."):
        return ""
    return path.removeprefix(f"{_ROOT}.")


def _order_initializers(graph: ir.Graph) -> None:
    """Sort the initializers by first use, and number those that are no weights."""
    constants = 0
    values = list(_by_first_use(graph))
    graph.initializers.clear()
    for value in values:
        if value.const_value is not None:
            value.name = f"constants.{constants}"
            value.const_value.name = value.name
            constants += 1
    for value in values:
        graph.register_initializer(value) if value.const_value else graph.initializers.add(value)


def _by_first_use(graph: ir.Graph) -> Iterable[ir.Value]:
    seen: dict[ir.Value, None] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                seen.setdefault(value)
    return seen
