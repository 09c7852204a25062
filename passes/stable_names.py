"""Names and order that depend on the graph alone."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import onnx_ir as ir

from eptc.pass_base import Contract, GraphPass

__all__ = ["StableNames"]

_PRODUCER = "eptc"


@dataclasses.dataclass(frozen=True)
class StableNames(GraphPass):
    """Names and order that depend on the graph alone, never on what the process did before.

    Before: n7: val_3 = MatMul(x, W); encoder.q/n8: y2 = Add(val_3, b)   {stack trace, ...}
    After:  MatMul: MatMul = MatMul(x, W); encoder.q/Add: encoder.q/Add = Add(MatMul, b)

    A node is called by its operator, numbered in the order of the graph; what stands before
    the last `/` of its old name, the module it came from, stays. A value is called like its
    node. Inputs, outputs and initializers keep their names; initializers are sorted by
    first use. Metadata and doc strings go; a symbolic size that the interface does not name
    becomes unknown. Exact: nothing that is computed changes. All scopes, functions included.
    """

    name: ClassVar[str] = "stable-names"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Rename in place; return how many names, sizes and notes changed."""
        scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        changed = _set(model, "producer_name", _PRODUCER) + _set(model, "producer_version", None)
        changed += _set(model, "doc_string", None) + _clear(model)
        changed += _set(model.graph, "name", _PRODUCER) + _sort_initializers(model.graph)
        for scope in scopes:
            changed += _set(scope, "doc_string", None) + _clear(scope)
            changed += _rename(scope) + _forget_sizes(scope, _interface_sizes(model.graph))
        return changed


def _set(item: Any, attribute: str, wanted: object) -> int:
    """Set an attribute; return whether that changed it. Empty and absent text are the same."""
    if (getattr(item, attribute) or None) == wanted:
        return 0
    setattr(item, attribute, wanted)
    return 1


def _clear(item: Any) -> int:
    """Remove an item's metadata; return whether it had any."""
    had = bool(item.metadata_props)
    item.metadata_props.clear()
    return int(had)


def _nodes(scope: ir.Graph | ir.Function) -> Iterable[ir.Node]:
    return ir.traversal.RecursiveGraphIterator(scope)


def _kept(scope: ir.Graph | ir.Function) -> set[str]:
    """Return the names that stay: what a caller sees, and the initializers of every graph."""
    graphs = {id(node.graph): node.graph for node in _nodes(scope) if node.graph is not None}
    values = [*scope.inputs, *scope.outputs]
    for graph in graphs.values():
        values += [*graph.inputs, *graph.outputs]
        if isinstance(graph, ir.Graph):
            values += graph.initializers.values()
    return {str(value.name) for value in values}


def _rename(scope: ir.Graph | ir.Function) -> int:
    taken = _kept(scope)
    kept = frozenset(taken)
    used: collections.Counter[str] = collections.Counter()
    changed = 0
    for node in _nodes(scope):
        module, slash, _ = (node.name or "").rpartition("/")
        name = _unused(f"{module}{slash}{node.op_type}", taken, used)
        changed += _set(node, "name", name) + _set(node, "doc_string", None) + _clear(node)
        for index, value in enumerate(node.outputs):
            changed += _set(value, "doc_string", None) + _clear(value)
            if value.name and value.name not in kept:
                changed += _set(value, "name", f"{name}:{index}" if index else name)
    for value in (*scope.inputs, *getattr(scope, "initializers", {}).values()):
        changed += _set(value, "doc_string", None) + _clear(value)
    return changed


def _unused(base: str, taken: set[str], used: collections.Counter[str]) -> str:
    """Return `base`, or `base` with the next number that makes a name nothing else has."""
    while True:
        name = f"{base}_{used[base]}" if used[base] else base
        used[base] += 1
        if name not in taken:
            taken.add(name)
            return name


def _sort_initializers(graph: ir.Graph) -> int:
    """Order the initializers by first use; return whether the order changed."""
    uses: dict[ir.Value, None] = {}
    for node in _nodes(graph):
        uses.update(dict.fromkeys(v for v in node.inputs if v is not None and v.is_initializer()))
    before = list(graph.initializers.values())
    after = [value for value in uses if value.graph is graph]
    after += [value for value in before if value not in uses]
    if before == after:
        return 0
    graph.initializers.clear()
    for value in after:
        graph.initializers.add(value)
    return 1


def _interface_sizes(graph: ir.Graph) -> set[str]:
    return {
        str(size)
        for value in (*graph.inputs, *graph.outputs)
        for size in value.shape or ()
        if not isinstance(size, int)
    }


def _forget_sizes(scope: ir.Graph | ir.Function, named: set[str]) -> int:
    """Make symbolic sizes with other names unknown; return how many values had one."""
    changed = 0
    for node in _nodes(scope):
        for value in node.outputs:
            sizes = [
                size if isinstance(size, int) or size.value is None or str(size) in named else None
                for size in value.shape or ()
            ]
            if value.shape is not None and list(value.shape) != sizes:
                value.shape = ir.Shape(sizes)
                changed += 1
    return changed
