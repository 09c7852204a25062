"""What stays in float32 when the rest of a graph is computed in 16 bits: the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["HalfPlan"]


@dataclasses.dataclass(frozen=True)
class HalfPlan:
    """What stays in float32.

    Args:
        nodes: nodes that compute in float32, each with the reason; all others that have float32
            inputs or outputs compute in 16 bits.
        masks: float32 values with numbers that 16 bits cannot hold, which only have to be far
            below everything else; where 16 bits read them they are cut to what 16 bits hold.
        wide: inputs and outputs of a cache that stay float32, each with the reason.
        weights: initializers that are stored in float32, each with the reason.
        types: the element type of every value, before.
    """

    nodes: Mapping[ir.Node, str]
    masks: frozenset[ir.Value]
    wide: Mapping[str, str]
    weights: Mapping[ir.Value, str]
    types: Mapping[ir.Value, ir.DataType]

    def reasons(self) -> dict[str, str]:
        """Return why each node, weight and cache that stays in float32 does, by its name."""
        named = {str(node.name): reason for node, reason in self.nodes.items()}
        named |= {str(value.name): reason for value, reason in self.weights.items()}
        return dict(sorted({**named, **self.wide}.items()))
