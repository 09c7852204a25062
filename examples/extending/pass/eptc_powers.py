"""Small whole powers as products, for accelerators and converters without Pow."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import onnx_ir as ir

from eptc.lower.edit import drop, insert, replace
from eptc.pass_base import Contract, GraphPass

__all__ = ["PowersAsProducts"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PowersAsProducts(GraphPass):
    """Write small whole powers as products.

    Before: y = Pow(x, 3)
    After:  y = Mul(Mul(x, x), x)

    For engines that leave ONNX Runtime, which has kernels for a norm as a whole and finds it by
    its Pow. Exact up to rounding. Main graph only. A power that is no constant, no whole number,
    below 2 or above `largest` is left alone, its reason logged at DEBUG.

    Args:
        largest: highest power to write so.
    """

    name: ClassVar[str] = "powers-as-products"
    contract: ClassVar[Contract] = "exact"
    largest: int = 2

    def rewrite(self, model: ir.Model) -> int:
        """Replace every such Pow; return how many were."""
        replaced = 0
        for node in tuple(model.graph):
            if node.op_identifier() != ("", "Pow", ""):
                continue
            power = _power(node)
            if power is None or not 2 <= power <= self.largest:
                logger.debug("%s: left %s alone: its power is %s", self.name, node.name, power)
                continue
            x, power_of_x = node.inputs[0], node.outputs[0]
            product = insert(node, "Mul", [x, x]).outputs[0]
            for _ in range(power - 2):
                product.shape = power_of_x.shape
                product = insert(node, "Mul", [product, x]).outputs[0]
            replace(power_of_x, product)
            drop(power_of_x)
            replaced += 1
        return replaced


def _power(node: ir.Node) -> int | None:
    """Return the power where it is one whole number."""
    exponent = node.inputs[1]
    if exponent is None or exponent.const_value is None or exponent.const_value.size != 1:
        return None
    number = float(exponent.const_value.numpy().item())
    return int(number) if number.is_integer() else None
