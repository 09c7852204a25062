"""Equality of integers, as two comparisons that every provider has a kernel for."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import onnx_ir as ir

from eptc.lower.edit import drop, insert, replace
from eptc.lower.element_types import INTEGERS
from eptc.pass_base import Contract, GraphPass

__all__ = ["SplitEqual"]

logger = logging.getLogger(__name__)

# The version of Equal that ONNX Runtime's CUDA provider has no kernel of.
_SINCE = 19


@dataclasses.dataclass(frozen=True)
class SplitEqual(GraphPass):
    """Equality of integers, as two comparisons that every provider has a kernel for.

    Before: y = Equal(a, b)                                    a, b integers of any shapes
    After:  y = And(LessOrEqual(a, b), GreaterOrEqual(a, b))

    ONNX Runtime's CUDA provider registers Equal up to opset 18: later, the node would run on the
    CPU, with a copy there and one back, and no run could be captured. Exact: numbers are not
    touched. Main graph only. An Equal of anything but int32 or int64, or of an earlier opset, is
    left alone, its reason logged at DEBUG.
    """

    name: ClassVar[str] = "split-equal"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:
        """Split every equality; return how many were."""
        split = 0
        for node in tuple(model.graph):
            if node.op_identifier() != ("", "Equal", ""):
                continue
            if model.opset_imports.get("", 0) < _SINCE:
                reason = "opset 18 and earlier have a kernel"
            elif any(value is None or value.dtype not in INTEGERS for value in node.inputs):
                reason = "it does not compare integers"
            else:
                _split(node)
                split += 1
                continue
            logger.debug("%s: left %s alone: %s", self.name, node.name, reason)
        return split


def _split(node: ir.Node) -> None:
    old = node.outputs[0]
    sides = [
        insert(node, op_type, node.inputs).outputs[0]
        for op_type in ("LessOrEqual", "GreaterOrEqual")
    ]
    for side in sides:
        side.type, side.shape = old.type, old.shape
    both = insert(node, "And", sides).outputs[0]
    both.shape = old.shape
    replace(old, both)
    drop(old)
