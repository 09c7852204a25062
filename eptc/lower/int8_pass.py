"""What both int8 passes are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from eptc.lower.int8 import FULL, REDUCED
from eptc.lower.quantizable import Quantizable, quantizable
from eptc.pass_base import QuantizingPass

__all__ = ["Int8Pass"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Pass(QuantizingPass):
    """A pass that makes products and tables int8, a step for each channel.

    Args:
        reduce_range: weights of -64 to 64: on x86 without VNNI, kernels add pairs of products
            in 16 bits, which overflow with the full range.
    """

    reduce_range: bool = False

    @property
    def largest(self) -> int:
        """The largest integer of a weight."""
        return REDUCED if self.reduce_range else FULL

    def plan(self, model: ir.Model) -> dict[str, str]:
        """Return why each weight that stays float32 does, by its name."""
        left: dict[str, str] = {}
        self.sites(model.graph, left.__setitem__)
        return left

    def sites(self, graph: ir.Graph, left: Callable[[str, str], None]) -> list[Quantizable]:
        """Return the weights that become integers, in the order of initializers.

        Args:
            graph: the main graph.
            left: called with the name of each other weight and why it is none.
        """
        return quantizable(graph, keep=self.keep, only=self.only, left=left)
