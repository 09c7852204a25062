"""The element type of every value of a graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx
import onnx_ir as ir

__all__ = ["INTEGERS", "element_types", "formal", "schema_of"]

# Those that a graph counts in.
INTEGERS: tuple[ir.DataType | None, ...] = (ir.DataType.INT32, ir.DataType.INT64)

_TENSOR = {
    "tensor(bool)": ir.DataType.BOOL,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int64)": ir.DataType.INT64,
}
# ONNX Runtime's operators have no schema here: the input whose type their output has, if not the
# first one.
_LIKE = {"GatherBlockQuantized": 2}


def element_types(model: ir.Model) -> dict[ir.Value, ir.DataType]:
    """Return the element type of every value of the main graph whose type is known.

    Where a value does not say so itself (a graph that was read from a file), its node does: by
    the operator's schema, and operators that have none make what one of their inputs is.
    """
    known: dict[ir.Value, ir.DataType] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        dtype = value.const_value.dtype if value.const_value is not None else value.dtype
        if dtype is not None:
            known[value] = dtype
    for node in model.graph:
        opset = model.opset_imports.get(node.domain, 1)
        for index, value in enumerate(node.outputs):
            dtype = value.dtype if value.dtype is not None else _made(node, index, known, opset)
            if dtype is not None:
                known[value] = dtype
    return known


def _made(
    node: ir.Node, index: int, known: dict[ir.Value, ir.DataType], opset: int
) -> ir.DataType | None:
    """Return the type of one output of a node."""
    if node.op_type in ("Cast", "ConstantOfShape", "Constant") and not node.domain:
        if "to" in node.attributes:
            return ir.DataType(node.attributes.get_int("to", 0))
        value = node.attributes.get("value")
        return ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    inputs = [None if value is None else known.get(value) for value in node.inputs]
    schema = schema_of(node.op_type, opset, node.domain)
    if schema is None:
        like = _LIKE.get(node.op_type, 0)
        return inputs[like] if like < len(inputs) else None
    bound = {
        formal(schema.inputs, number).type_str: dtype
        for number, dtype in enumerate(inputs)
        if dtype is not None
    }
    name = formal(schema.outputs, index).type_str
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    found = allowed.get(name, [name])
    return bound.get(name) or (_TENSOR.get(found[0]) if len(found) == 1 else None)


def formal(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], number: int
) -> onnx.defs.OpSchema.FormalParameter:
    """Return what an operator's schema says of a parameter; the last one may stand for several."""
    return formals[min(number, len(formals) - 1)]


@functools.cache
def schema_of(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    """Return an operator's schema; None where onnx has none."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
