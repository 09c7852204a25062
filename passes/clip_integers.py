"""Clip integers by operators that more runtimes have for them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from eptc.lower.edit import drop, insert, replace
from eptc.lower.element_types import INTEGERS, element_types
from eptc.pass_base import Contract, GraphPass

__all__ = ["ClipIntegers"]


@dataclasses.dataclass(frozen=True)
class ClipIntegers(GraphPass):
    """Clip integers by Max and Min.

    Before: y = Clip(x, low, high)               x [...] int32 or int64, low and high [] or absent
    After:  y = Min(Max(x, low), high)

    Exact. TensorRT clips floating-point numbers alone; relative positions, which T5 and DeBERTa
    clip, are integers. Main graph only. A Clip of other types is left alone, and one without a
    bound, which changes nothing.
    """

    name: ClassVar[str] = "clip-integers"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Rewrite every Clip of integers; return how many there were."""
        types = element_types(model)
        rewritten = 0
        for node in tuple(model.graph):
            value, low, high = (*node.inputs, None, None, None)[:3]
            if node.op_identifier() != ("", "Clip", "") or value is None:
                continue
            bounds = [(op, v) for op, v in (("Max", low), ("Min", high)) if v is not None]
            if types.get(value) not in INTEGERS or not bounds:
                continue
            for operator, bound in bounds:
                value = insert(node, operator, [value, bound]).outputs[0]
                value.shape = node.outputs[0].shape
            replace(node.outputs[0], value)
            drop(node.outputs[0])
            rewritten += 1
        return rewritten
