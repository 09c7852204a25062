"""int8 products and tables, the activations in steps that were calibrated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import onnx_ir as ir

from eptc.lower.edit import constant
from eptc.lower.int8 import activation
from eptc.lower.int8_nodes import add_bias, by_position, node, read_rows, store, turned
from eptc.lower.int8_pass import Int8Pass
from eptc.lower.quantizable import Product, Quantizable
from eptc.tensors import Array

__all__ = ["QuantizeInt8Static"]

_FLOAT = ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class QuantizeInt8Static(Int8Pass):
    """int8 products and tables, the activations in steps that were calibrated.

    Before: y = MatMul(x, W)                            x [..., in], W [in, out] float32
            e = Gather(E, ids)                          E [rows, width] float32
    After:  xd = DequantizeLinear(QuantizeLinear(x))    once for all that read x
            y = MatMul(xd, DequantizeLinear(W8, W8@scale, axis=1))    W8@scale [out]
            e = Cast(Gather(E8, ids)) * Gather(E8@scale, ids)         E8@scale [rows]

    Lossy: a weight moves by up to half a step of its column (a table's: of its row), an
    activation by up to a step of its range; what is outside is cut off. Biases stay float32. A
    Gemm becomes the same, with an Add. A table that is also the head is stored once.

    A range that is not finite, or the wrong way round, is an `OptionError`.

    Main graph only. A weight is left alone, its reason logged at DEBUG, where
    `quantize-int8-dynamic` leaves it alone, or an activation that it multiplies has no range.

    Beside these options it has those of `Int8Pass`: `keep`, `only` and `reduce_range`.

    Args:
        ranges: smallest and largest value of each activation, by its name in the graph; each is
            widened to hold zero.
        symmetric: int8 activations with zero point 0, and integers read by DequantizeLinear
            alone, as TensorRT demands: a table is dequantized before its rows are read.
            Otherwise uint8 activations, which ONNX Runtime's CPU kernels take.
    """

    name: ClassVar[str] = "quantize-int8-static"
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict, repr=False)
    symmetric: bool = False

    def options(self) -> dict[str, Any]:
        """Return the pass's options as JSON values; of the ranges, their number and digest.

        The digest is the SHA-256 of the JSON list of [name, low, high], sorted by name, without
        spaces, each number as Python's shortest text that reads back the same.
        """
        listed = [[name, float(low), float(high)] for name, (low, high) in self.ranges.items()]
        text = json.dumps(sorted(listed), separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {**super().options(), "ranges": {"count": len(listed), "sha256": digest}}

    def rewrite(self, model: ir.Model) -> int:
        """Quantize every weight that can be; return how many were."""
        graph = model.graph
        sites = self.sites(graph, self.left)
        products = by_position(sites, graph)
        # First: a value has another name once the product that makes it was replaced.
        steps = [self._step(product) for _, product in products]
        scales = {site.weight: store(site, graph, largest=self.largest) for site in sites}
        rounded: dict[ir.Value, ir.Value] = {}
        for (site, product), step in zip(products, steps, strict=True):
            if product.x not in rounded:
                rounded[product.x] = _round(product, step, graph)
            inputs = [rounded[product.x], self._weight(site, product, scales[site.weight])]
            add_bias(product, node(product.node, "MatMul", inputs, [_FLOAT])[0])
        for site in sites:
            if self.symmetric:
                _dequantize_table(site, scales[site.weight])
            else:
                read_rows(site, scales[site.weight], graph)
        return len(sites)

    def sites(self, graph: ir.Graph, left: Callable[[str, str], None]) -> list[Quantizable]:
        """Return the weights that become integers: those whose activations have ranges."""
        found = []
        for site in super().sites(graph, left):
            missing = [str(p.x.name) for p in site.products if p.x.name not in self.ranges]
            if missing:
                left(str(site.weight.name), f"{missing[0]} has no range")
            else:
                found.append(site)
        return found

    def _step(self, product: Product) -> tuple[Array, Array]:
        """Return scale and zero point of what is multiplied."""
        name = str(product.x.name)
        return activation(*self.ranges[name], symmetric=self.symmetric, name=name)

    def _weight(self, site: Quantizable, product: Product, scale: ir.Value) -> ir.Value:
        """Return the weight as the product reads it."""
        if not self.symmetric:
            # Turned before: ONNX Runtime knows a product of two DequantizeLinear.
            whole = turned(site, product)
            axis = {"axis": 1}
            return node(product.node, "DequantizeLinear", [whole, scale], [_FLOAT], axis)[0]
        inputs, axis = [site.weight, scale], {"axis": site.axis}
        weight = node(product.node, "DequantizeLinear", inputs, [_FLOAT], axis)[0]
        if not product.transposed:
            return weight
        return node(product.node, "Transpose", [weight], [_FLOAT], {"perm": [1, 0]})[0]


def _round(product: Product, step: tuple[Array, Array], graph: ir.Graph) -> ir.Value:
    """Return what is multiplied, in whole steps."""
    scale, zero = (constant(graph, array) for array in step)
    assert zero.dtype is not None
    whole = node(product.node, "QuantizeLinear", [product.x, scale, zero], [zero.dtype])[0]
    return node(product.node, "DequantizeLinear", [whole, scale, zero], [_FLOAT])[0]


def _dequantize_table(site: Quantizable, scale: ir.Value) -> None:
    """Let every Gather of a table read what DequantizeLinear makes of its integers."""
    for gather in site.gathers:
        inputs, axis = [site.weight, scale], {"axis": site.axis}
        table = node(gather, "DequantizeLinear", inputs, [_FLOAT], axis)[0]
        gather.replace_input_with(0, table)
