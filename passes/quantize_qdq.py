"""Products in 8 bits, as explicit QuantizeLinear and DequantizeLinear: what TensorRT reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from eptc.errors import OptionError
from eptc.lower import float8, int8
from eptc.lower.edit import constant
from eptc.lower.int8_nodes import add_bias, node, register_scale
from eptc.lower.quantizable import Product, Quantizable, quantizable
from eptc.lower.ranges import Ranges, digest, round_products, with_ranges
from eptc.pass_base import QuantizingPass
from eptc.tensors import Array

__all__ = ["QuantizeQdq"]

_FLOAT = ir.DataType.FLOAT
_TABLE = "rows are looked up in it, and DequantizeLinear would compute all of it in every run"


@dataclasses.dataclass(frozen=True)
class QuantizeQdq(QuantizingPass):
    """Products in 8 bits around standard operators, in the form that TensorRT takes.

    Before: y = MatMul(x, W)                                W [in, out] float32
    After:  xd = DequantizeLinear(QuantizeLinear(x, s, 0), s, 0)       once for all that read x
            y = MatMul(xd, DequantizeLinear(W8, W8@scale, 0))

    TensorRT's rules: types and scales are in the file, every zero point is 0, an activation has
    one scale, the integers of a weight are constants that DequantizeLinear alone reads, biases
    stay float32. A Gemm becomes a MatMul and an Add.

    int8: W8@scale [out], along the axis of the outputs; -127 to 127. Lossy: a weight moves by up
    to half a step of its column, an activation by up to half a step, range / 254.
    fp8 (FLOAT8E4M3FN): one W8@scale for the weight. Lossy: what is not very small moves by up to
    a sixteenth of itself. What is beyond an activation's range is cut off.

    A range that is not finite, or the wrong way round, is an `OptionError`.

    Main graph only. A weight is left alone, its reason logged at DEBUG, where
    `quantize-int8-dynamic` leaves it alone, an activation that it multiplies has no range, or its
    rows are looked up too.

    Beside these options it has those of `QuantizingPass`: `keep` and `only`.

    Args:
        ranges: smallest and largest value of each activation, by its name in the graph; each is
            widened to hold zero.
        number: `int8` or `fp8`.
    """

    name: ClassVar[str] = "quantize-qdq"
    ranges: Ranges = dataclasses.field(default_factory=dict, repr=False)
    number: Literal["int8", "fp8"] = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.number not in ("int8", "fp8"):
            raise OptionError(f"the 8-bit number is {self.number!r}", expected="int8 or fp8")

    def options(self) -> dict[str, Any]:
        """Return the pass's options as JSON values; of the ranges, `lower.ranges.digest`."""
        return {**super().options(), "ranges": digest(self.ranges)}

    def plan(self, model: ir.Model) -> dict[str, str]:
        """Return why each weight that stays float32 does, by its name."""
        left: dict[str, str] = {}
        self.sites(model.graph, left.__setitem__)
        return left

    def rewrite(self, model: ir.Model) -> int:
        """Quantize every weight that can be; return how many were."""
        graph = model.graph
        sites = self.sites(graph, self.left)
        store = functools.partial(self._store, graph=graph)
        multiply = functools.partial(self._multiply, graph=graph)
        round_products(sites, graph, step=self._step, store=store, multiply=multiply)
        return len(sites)

    def sites(self, graph: ir.Graph, left: Callable[[str, str], None]) -> list[Quantizable]:
        """Return the weights that are quantized, in the order of initializers.

        Args:
            graph: the main graph.
            left: called with the name of each other weight and why it is none.
        """
        found = quantizable(graph, keep=self.keep, only=self.only, left=left)
        for site in found:
            if site.gathers:
                left(str(site.weight.name), _TABLE)
        return with_ranges([site for site in found if not site.gathers], self.ranges, left)

    def _step(self, product: Product) -> tuple[Array, Array]:
        """Return scale and zero point of what is multiplied."""
        name = str(product.x.name)
        low, high = self.ranges[name]
        if self.number == "fp8":
            return float8.activation_scale(low, high, name=name), float8.ZERO
        return int8.activation(low, high, symmetric=True, name=name)

    def _store(self, site: Quantizable, graph: ir.Graph) -> ir.Value:
        """Make a weight 8 bits, in place, and return the new initializer with its scale."""
        tensor = site.weight.const_value
        assert tensor is not None
        fp8 = self.number == "fp8"
        stored, scale = float8.float8(tensor) if fp8 else int8.integers(tensor, site.axis)
        # A type of its own: copies of a graph share theirs.
        site.weight.const_value, site.weight.type = stored, ir.TensorType(stored.dtype)
        return register_scale(scale, graph)

    def _multiply(
        self,
        site: Quantizable,
        product: Product,
        x: ir.Value,
        scale: ir.Value,
        *,
        graph: ir.Graph,
    ) -> None:
        """Let a product read a rounded activation and its weight of 8 bits."""
        weight = self._weight(site, product, scale, graph)
        add_bias(product, node(product.node, "MatMul", [x, weight], [_FLOAT])[0])

    def _weight(
        self, site: Quantizable, product: Product, scale: ir.Value, graph: ir.Graph
    ) -> ir.Value:
        """Return the weight as the product reads it."""
        assert scale.shape is not None
        dtype = site.weight.dtype
        assert dtype is not None
        # Not left out, though it is 0: older parsers of TensorRT want it.
        zeros = constant(graph, np.zeros(scale.shape.numpy(), dtype.numpy()))
        inputs, axis = [site.weight, scale, zeros], {"axis": site.axis} if len(scale.shape) else {}
        weight = node(product.node, "DequantizeLinear", inputs, [_FLOAT], axis)[0]
        if not product.transposed:
            return weight
        return node(product.node, "Transpose", [weight], [_FLOAT], {"perm": [1, 0]})[0]
