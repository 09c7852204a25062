"""Scales of 8-bit numbers that 16 bits cannot hold as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from eptc.lower.sharing import is_scaling
from eptc.lower.weights import WeightTensor
from eptc.tensors import limit, smallest

__all__ = ["lossy_scales"]


def lossy_scales(
    graph: ir.Graph, dtype: str, ranges: Mapping[str, float], small: Collection[str]
) -> Iterator[tuple[ir.Node, str]]:
    """Yield nodes that quantize or dequantize and cannot in 16 bits, each with the reason.

    Args:
        graph: the main graph; no weight is read.
        dtype: the 16-bit type.
        ranges: largest magnitude of weights before they were 8 bits, by name.
        small: weights with scales below the smallest number that has all its digits.
    """
    least = smallest(dtype)
    for node in filter(is_scaling, graph):
        x, scale = node.inputs[:2]
        if x is None or scale is None or scale.const_value is None:
            continue
        if isinstance(scale.const_value, WeightTensor):
            name, magnitude = str(x.name), ranges.get(str(x.name), 0.0)
            if name in small:
                yield node, f"{name} has scales below {least:.3g}"
            elif magnitude > limit(dtype):
                yield node, f"{name} has numbers up to {magnitude:.3g}"
        elif (scale.const_value.numpy() < least).any():
            yield node, f"its scale is {scale.const_value.numpy().min():.3g}, below {least:.3g}"
