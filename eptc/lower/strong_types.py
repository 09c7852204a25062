"""Whether every type is in the graph: no node may read two types where its operator knows one.

TensorRT builds a strongly typed network of what the file says, and inserts no cast; so does
ONNX Runtime. onnx.checker looks at none of this where an operator's output type follows from one
of its inputs.
"""

from __future__ import annotations

import onnx_ir as ir

from eptc.errors import InternalError
from eptc.lower.element_types import element_types, formal, schema_of

__all__ = ["check_types"]

_SPELLED = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


def check_types(model: ir.Model) -> None:
    """Raise InternalError, naming the node, where types do not fit its operator.

    Nodes of the main graph whose operator has a schema, and values whose type is known, are
    looked at; no weight is read.
    """
    types = element_types(model)
    for node in model.graph:
        opset = model.opset_imports.get(node.domain, 1)
        schema = schema_of(node.op_type, opset, node.domain)
        if schema is None:
            continue
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        bound: dict[str, str] = {}
        for formals, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
            for number, value in enumerate(values):
                if value is None or value not in types or not formals:
                    continue
                declared = formal(formals, number)
                found = f"tensor({_spelled(types[value])})"
                if not declared.is_homogeneous:
                    continue
                if found not in allowed.get(declared.type_str, {declared.type_str}):
                    raise _wrong(node, value, f"{found}, which it has no form for")
                first = bound.setdefault(declared.type_str, found)
                if first != found:
                    raise _wrong(node, value, f"{found}, where another one is {first}")


def _wrong(node: ir.Node, value: ir.Value, found: str) -> InternalError:
    return InternalError(f"{node.name} ({node.op_type}) has {value.name} of type {found}")


def _spelled(dtype: ir.DataType) -> str:
    return _SPELLED.get(dtype, dtype.name.lower())
