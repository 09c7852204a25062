"""Count positions in float32, for runtimes that sum no integers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from eptc.lower.edit import drop, insert, made_by, replace
from eptc.lower.element_types import INTEGERS, element_types
from eptc.pass_base import Contract, GraphPass

__all__ = ["CountInFloat"]


@dataclasses.dataclass(frozen=True)
class CountInFloat(GraphPass):
    """Count with a CumSum of float32.

    Before: y = CumSum(Cast <int64> (b), axis)               b [...] bool, by one Cast or more
    After:  y = Cast <int64> (CumSum(Cast <float> (b), axis))

    Exact up to 2**24 = 16,777,216 positions, more than any model has. TensorRT's CumSum takes
    floating-point numbers alone, and RoBERTa counts its positions. Main graph only. Sums of
    anything but ones and zeros are left alone: they might be larger.
    """

    name: ClassVar[str] = "count-in-float"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite every count; return how many there were."""
        types = element_types(model)
        rewritten = 0
        for node in tuple(model.graph):
            if node.op_identifier() != ("", "CumSum", ""):
                continue
            flags = node.inputs[0]
            while (cast := made_by(flags, "Cast")) is not None:  # ones and zeros in any type
                flags = cast.inputs[0]
            kind = types.get(node.outputs[0])
            if flags is None or types.get(flags) != ir.DataType.BOOL or kind not in INTEGERS:
                continue
            assert kind is not None
            one = insert(node, "Cast", [flags], {"to": int(ir.DataType.FLOAT)}).outputs[0]
            one.type = ir.TensorType(ir.DataType.FLOAT)
            attributes = dict(node.attributes)
            counted = insert(node, "CumSum", [one, node.inputs[1]], attributes).outputs[0]
            result = insert(node, "Cast", [counted], {"to": int(kind)}).outputs[0]
            replace(node.outputs[0], result)
            drop(node.outputs[0])
            rewritten += 1
        return rewritten
