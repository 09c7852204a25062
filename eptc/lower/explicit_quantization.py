"""The rules by which TensorRT reads QuantizeLinear and DequantizeLinear.

They are those of its "explicit quantization" and of its ONNX parser: symmetric numbers in int8 or
FLOAT8E4M3FN, scales above 0 in the file, one for an activation; what is quantized is only ever
dequantized, with the scale it was quantized by.
"""

from __future__ import annotations

import onnx_ir as ir

from eptc.errors import InternalError
from eptc.lower.weights import WeightTensor

__all__ = ["NUMBERS", "check_explicit"]

# What TensorRT quantizes activations and weights to, of what eptc writes.
NUMBERS = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)
_Q, _DQ = (("", name, "") for name in ("QuantizeLinear", "DequantizeLinear"))


def check_explicit(graph: ir.Graph) -> None:
    """Raise InternalError, naming the node, where a graph breaks one of these rules.

    The scales of weights that are still lazy are not read.
    """
    for node in graph:
        if node.op_identifier() in (_Q, _DQ):
            if reason := _broken(node):
                raise InternalError(f"{node.name} ({node.op_type}) {reason}")
        elif any(v is not None and v.dtype in NUMBERS and _weighs(v) for v in node.inputs):
            raise InternalError(f"{node.name} ({node.op_type}) reads 8-bit numbers as they are")


def _weighs(value: ir.Value) -> bool:
    """Whether a value has numbers of its own, and is no zero point."""
    return value.shape is None or len(value.shape) > 0


def _broken(node: ir.Node) -> str | None:
    """Return which rule a node breaks."""
    x, scale, zero = (*node.inputs, None, None)[:3]
    if x is None or scale is None or zero is None:
        return "leaves out its scale or its zero point"
    steps, middle = scale.const_value, zero.const_value
    if steps is None or middle is None:
        return "has a scale or a zero point that a run computes"
    if zero.dtype not in NUMBERS:
        return f"has numbers of {zero.dtype}, expected int8 or float8e4m3fn"
    if middle.numpy().astype(float).any():
        return "has a zero point other than 0"
    if scale.dtype != ir.DataType.FLOAT:
        return f"has a scale of {scale.dtype}, expected float32"
    if not isinstance(steps, WeightTensor) and not (steps.numpy() > 0).all():
        return "has a scale that is not above 0"
    return _wrong_scale(node, x, scale)


def _wrong_scale(node: ir.Node, x: ir.Value, scale: ir.Value) -> str | None:
    """Return why a scale is not that of what is scaled."""
    assert scale.shape is not None
    count = tuple(scale.shape.numpy())
    if x.is_initializer():
        axis = node.attributes.get_int("axis", 1)
        shape = () if x.shape is None else tuple(x.shape.numpy())
        if count and count != shape[axis : axis + 1 or None]:
            return f"has {count[0]} scales along axis {axis} of a weight {list(shape)}"
    elif count:
        return "has several scales for an activation"
    elif node.op_identifier() == _DQ:
        maker = x.producer()
        if maker is None or maker.op_identifier() != _Q or maker.inputs[1] is not scale:
            return "has another scale than what quantized its input"
    if node.op_identifier() == _Q and any(
        user.op_identifier() != _DQ for user in node.outputs[0].consumers()
    ):
        return "makes 8-bit numbers that something else than DequantizeLinear reads"
    return None
