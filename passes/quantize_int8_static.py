"""int8 products and tables, the activations in steps that were calibrated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import onnx_ir as ir

from eptc.lower.int8 import activation
from eptc.lower.int8_nodes import add_bias, node, read_rows, store, turned
from eptc.lower.int8_pass import Int8Pass
from eptc.lower.quantizable import Product, Quantizable
from eptc.lower.ranges import Ranges, digest, round_products, with_ranges
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

    The activations are uint8, which ONNX Runtime's CPU kernels take; `quantize-qdq` is for others.

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
    """

    name: ClassVar[str] = "quantize-int8-static"
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)

    def options(self) -> dict[str, Any]:
        """Return the pass's options as JSON values; of the ranges, `lower.ranges.digest`."""
        return {**super().options(), "ranges": digest(self.ranges)}

    def rewrite(self, model: ir.Model) -> int:
        """Quantize every weight that can be; return how many were."""
        graph = model.graph
        sites = self.sites(graph, self.left)
        scales = round_products(
            sites,
            graph,
            step=self._step,
            store=functools.partial(store, graph=graph, largest=self.largest),
            multiply=self._multiply,
        )
        for site in sites:
            read_rows(site, scales[site.weight], graph)
        return len(sites)

    def sites(self, graph: ir.Graph, left: Callable[[str, str], None]) -> list[Quantizable]:
        """Return the weights that become integers: those whose activations have ranges."""
        return with_ranges(super().sites(graph, left), self.ranges, left)

    def _step(self, product: Product) -> tuple[Array, Array]:
        """Return scale and zero point of what is multiplied."""
        name = str(product.x.name)
        return activation(*self.ranges[name], symmetric=False, name=name)

    def _multiply(self, site: Quantizable, product: Product, x: ir.Value, scale: ir.Value) -> None:
        """Let a product read a rounded activation and its weight's integers."""
        # Turned before: ONNX Runtime knows a product of two DequantizeLinear.
        inputs, axis = [turned(site, product), scale], {"axis": 1}
        weight = node(product.node, "DequantizeLinear", inputs, [_FLOAT], axis)[0]
        add_bias(product, node(product.node, "MatMul", [x, weight], [_FLOAT])[0])
