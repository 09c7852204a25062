"""Reshape targets as constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["constant_reshapes"]


def constant_reshapes(graph: ir.Graph) -> None:
    """Replace computed Reshape targets by constants, in place.

    Before: y = Reshape(x, Concat(Shape(x)[0], Shape(x)[1], 4, 16))    x [batch, sequence, 64]
    After:  y = Reshape(x, [0, 0, 4, 16])

    0 stands for the size of x at the same position, -1 for the one size left. A Reshape is
    left alone where more than one size is neither fixed nor kept.
    """
    for node in tuple(graph):
        if node.op_identifier() != ("", "Reshape", "") or node.inputs[1] is None:
            continue
        if node.inputs[1].const_value is not None:
            continue
        target = _target(node)
        if target is None:
            continue
        constant = ir.node("Constant", [], attributes={"value_ints": target})
        constant.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        constant.outputs[0].shape = ir.Shape([len(target)])
        constant.outputs[0].const_value = ir.tensor(np.array(target, np.int64))
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)


def _target(reshape: ir.Node) -> list[int] | None:
    x, y = reshape.inputs[0], reshape.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return None
    target = []
    for axis, size in enumerate(y.shape):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(x.shape) and size.value is not None and size == x.shape[axis]:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and 0 not in _fixed(y.shape) else None


def _fixed(shape: ir.Shape) -> list[int]:
    return [size for size in shape if isinstance(size, int)]
