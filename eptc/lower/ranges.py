"""The ranges of activations that passes fix steps by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from eptc.lower.edit import constant
from eptc.lower.int8_nodes import by_position, node
from eptc.lower.quantizable import Product, Quantizable
from eptc.tensors import Array

__all__ = ["Ranges", "digest", "round_products", "with_ranges"]

# Smallest and largest value of each activation, by its name in the graph.
Ranges = Mapping[str, tuple[float, float]]


def digest(ranges: Ranges) -> dict[str, Any]:
    """Return the number of ranges and what tells them from others, as JSON values.

    `sha256` is that of the JSON list of [name, low, high], sorted by name, without spaces, each
    number as Python's shortest text that reads back the same.
    """
    listed = [[name, float(low), float(high)] for name, (low, high) in ranges.items()]
    text = json.dumps(sorted(listed), separators=(",", ":"), ensure_ascii=False)
    return {"count": len(listed), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def with_ranges(
    sites: Sequence[Quantizable], ranges: Ranges, left: Callable[[str, str], None]
) -> list[Quantizable]:
    """Return the weights whose activations have ranges.

    Args:
        sites: the weights.
        ranges: of activations.
        left: called with the name of each other weight and why it is none.
    """
    found = []
    for site in sites:
        missing = [str(p.x.name) for p in site.products if p.x.name not in ranges]
        if missing:
            left(str(site.weight.name), f"{missing[0]} has no range")
        else:
            found.append(site)
    return found


def round_products(
    sites: Sequence[Quantizable],
    graph: ir.Graph,
    *,
    step: Callable[[Product], tuple[Array, Array]],
    store: Callable[[Quantizable], ir.Value],
    multiply: Callable[[Quantizable, Product, ir.Value, ir.Value], None],
) -> dict[ir.Value, ir.Value]:
    """Let every product of some weights multiply what is rounded; return the weights' scales.

    Before: y = MatMul(x, W)
    After:  xd = DequantizeLinear(QuantizeLinear(x, *step), *step)     once for all that read x
            y = multiply(xd, W8, W8@scale)

    Args:
        sites: the weights.
        graph: the main graph; it is as it was where `step` raises.
        step: gives scale and zero point of what a product multiplies.
        store: makes a weight 8 bits, in place, and gives its scale.
        multiply: puts another in the place of a product, given its weight, the rounded
            activation and the weight's scale.
    """
    products = by_position(sites, graph)
    # First: a value has another name once the product that makes it was replaced.
    steps = [step(product) for _, product in products]
    scales = {site.weight: store(site) for site in sites}
    rounded: dict[ir.Value, ir.Value] = {}
    for (site, product), its_step in zip(products, steps, strict=True):
        if product.x not in rounded:
            rounded[product.x] = _round_activation(product, its_step, graph)
        multiply(site, product, rounded[product.x], scales[site.weight])
    return scales


def _round_activation(product: Product, step: tuple[Array, Array], graph: ir.Graph) -> ir.Value:
    """Put QuantizeLinear and DequantizeLinear behind what is multiplied; return the result.

    Args:
        product: the first that reads it.
        step: scale and zero point.
        graph: the main graph.
    """
    scale, zero = (constant(graph, array) for array in step)
    assert zero.dtype is not None
    whole = node(product.node, "QuantizeLinear", [product.x, scale, zero], [zero.dtype])[0]
    return node(product.node, "DequantizeLinear", [whole, scale, zero], [ir.DataType.FLOAT])[0]
