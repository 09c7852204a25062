"""int8 products and tables, the activations quantized as they come."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from eptc.lower.int8_nodes import add_bias, by_position, node, read_rows, store, turned
from eptc.lower.int8_pass import Int8Pass
from eptc.lower.quantizable import Product

__all__ = ["QuantizeInt8Dynamic"]

_FLOAT, _INT32, _UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8


@dataclasses.dataclass(frozen=True)
class QuantizeInt8Dynamic(Int8Pass):
    """int8 products and tables, the activations quantized as they come.

    Before: y = MatMul(x, W)                             x [..., in], W [in, out] float32
            e = Gather(E, ids)                           E [rows, width] float32
    After:  xq, s, z = DynamicQuantizeLinear(x)          once for all that read x
            y = Cast(MatMulInteger(xq, W8, z)) * (s * W8@scale)    W8@scale [out]
            e = Cast(Gather(E8, ids)) * Gather(E8@scale, ids)      E8@scale [rows]

    Lossy: a weight moves by up to half a step of its column (a table's: of its row), an
    activation by up to half a step of its tensor, (max - min) / 255. Standard operators, in the
    form that ONNX Runtime fuses when it loads the graph; a Gemm becomes the same, with an Add.
    A table that is also the head is stored once: the step of a row is that of an output.

    Main graph only. A weight is left alone, its reason logged at DEBUG, where it is not bound,
    no float32 matrix, has a side of fewer than 16 or is a table of fewer than 64 rows, is read
    by anything else, or a caller can set or read it; `plan` returns which and why.

    The options are those of `Int8Pass`: `keep`, `only` and `reduce_range`.
    """

    name: ClassVar[str] = "quantize-int8-dynamic"

    def rewrite(self, model: ir.Model) -> int:
        """Quantize every weight that can be; return how many were."""
        graph = model.graph
        sites = self.sites(graph, self.left)
        scales = {site.weight: store(site, graph, largest=self.largest) for site in sites}
        quantized: dict[ir.Value, tuple[ir.Value, ...]] = {}
        for site, product in by_position(sites, graph):
            if product.x not in quantized:
                quantized[product.x] = _quantize(product)
            weight = turned(site, product)
            add_bias(
                product, _multiply(product, quantized[product.x], weight, scales[site.weight])
            )
        for site in sites:
            read_rows(site, scales[site.weight], graph)
        return len(sites)


def _quantize(product: Product) -> tuple[ir.Value, ...]:
    """Return the integers, the scale and the zero point of what is multiplied."""
    types = [_UINT8, _FLOAT, _UINT8]
    return tuple(node(product.node, "DynamicQuantizeLinear", [product.x], types))


def _multiply(
    product: Product, x: tuple[ir.Value, ...], weight: ir.Value, scale: ir.Value
) -> ir.Value:
    """Return the product of integers, scaled."""
    whole, step, zero = x
    sums = node(product.node, "MatMulInteger", [whole, weight, zero], [_INT32])
    single = node(product.node, "Cast", sums, [_FLOAT], {"to": int(_FLOAT)})[0]
    # In this order: it is how ONNX Runtime recognises the two scales.
    both = node(product.node, "Mul", [step, scale], [_FLOAT])[0]
    return node(product.node, "Mul", [single, both], [_FLOAT])[0]
