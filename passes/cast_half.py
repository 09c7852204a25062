"""Compute in 16-bit floating point."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from eptc.errors import OptionError
from eptc.lower.edit import constant, insert, module
from eptc.lower.half import CACHES, HALF, MOVES, plan_half
from eptc.lower.half_plan import HalfPlan
from eptc.lower.sharing import is_scaling
from eptc.lower.weights import Piece, WeightTensor, split
from eptc.pass_base import LossyPass
from eptc.tensors import Array, cast, limit, smallest

__all__ = ["CastHalf"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CastHalf(LossyPass):
    """Compute in 16-bit floating point what 16 bits are enough for.

    Before: y = MatMul(x, W)                    x, W, y float32
    After:  y = MatMul(Cast(x), W16)            W16, y 16 bits

    Weights are rounded once, from what they were before they became float32. Each value is cast
    at most once each way, and numbers that are only moved stay what they are. Inputs and
    outputs of a cache become 16 bits; the others, logits among them, keep their types. What
    stays float32, and why, is what `plan` returns:

    * values that reach beyond the largest number of float16, by `ranges` and `safety`, and the
      nodes that make or read them; so do weights with such numbers, and what computes with them;
    * routers, norms that are written out, softmax, masks (cut to what 16 bits hold where an
      attention kernel reads them), angles of positions, T5's `wo`, the product that makes the
      logits;
    * whatever has no 16-bit kernel in ONNX Runtime's CUDA provider, and what `keep` names;
    * of 8-bit products, those with scales for which float16 has not all its digits, below 2**-14,
      and those that share a scale with one that is kept: no cast comes between QuantizeLinear,
      DequantizeLinear and their product. Scales may not move: `quantize-qdq` with `digits`.

    Scores inside one attention kernel are no value of the graph, so `ranges` cannot cover them.

    Not exact. Main graph only. A weight that a caller can set, and a graph that has 16-bit
    values already, are left alone.

    Args:
        dtype: `float16` or `bfloat16`.
        ranges: largest magnitude of values by name, as observed, and of weights; what is not
            there is taken to fit, and a weight that does not is an `OptionError` once it is read.
        safety: how many times larger than observed a value must still fit; text that was not
            observed may reach further. float16 only: bfloat16 reaches as far as float32.
        keep: parameters that stay float32, with the nodes that read them.
        small: 8-bit weights with scales below 2**-14; one that is not named here is an
            `OptionError` once its scales are read.
    """

    name: ClassVar[str] = "cast-half"
    retypes: ClassVar[bool] = True
    dtype: Literal["float16", "bfloat16"] = "float16"
    ranges: Mapping[str, float] = dataclasses.field(default_factory=dict, repr=False)
    safety: float = 8.0
    keep: Sequence[str] = ()
    small: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.dtype not in HALF:
            raise OptionError(f"the 16-bit type is {self.dtype!r}", expected=" or ".join(HALF))
        if not self.safety >= 1:
            raise OptionError(f"the safety factor is {self.safety!r}", expected="1 or more")
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "small", tuple(self.small))

    def options(self) -> dict[str, Any]:
        """Return the options, of the ranges only those that keep something in float32."""
        bound = limit(self.dtype) / self.safety
        beyond = {k: v for k, v in sorted(self.ranges.items()) if not v <= bound}
        return {
            "dtype": self.dtype,
            "ranges": beyond if self.dtype == "float16" else {},
            "safety": self.safety,
            "keep": list(self.keep),
            "small": list(self.small),
        }

    def plan(self, model: ir.Model) -> dict[str, str]:
        """Return why each node, weight and cache that stays in float32 does, by its name."""
        return self._plan(model).reasons()

    def rewrite(self, model: ir.Model) -> int:
        """Convert the graph; return how many nodes compute in 16 bits."""
        plan = self._plan(model)
        if HALF[self.dtype] in plan.types.values():
            logger.debug("%s: left the graph alone: it has %s already", self.name, self.dtype)
            return 0
        for node, reason in plan.nodes.items():
            logger.debug("%s: left %s alone: %s", self.name, node.name, reason)
        return _Writer(model.graph, plan, self.dtype).write()

    def _plan(self, model: ir.Model) -> HalfPlan:
        keep, small = tuple(self.keep), tuple(self.small)
        return plan_half(
            model, self.dtype, self.ranges, safety=self.safety, keep=keep, small=small
        )


class _Writer:
    """Carries out a plan.

    Args:
        graph: the main graph, converted in place.
        plan: what stays in float32.
        dtype: what the rest becomes.
    """

    def __init__(self, graph: ir.Graph, plan: HalfPlan, dtype: str) -> None:
        self._graph = graph
        self._plan = plan
        self._dtype = dtype
        self._half = HALF[dtype]
        # The type of each value that was float32, and the value itself in its other type.
        self._types: dict[ir.Value, ir.DataType] = {
            value: dtype for value, dtype in plan.types.items() if dtype == ir.DataType.FLOAT
        }
        self._casts: dict[ir.Value, ir.Value] = {}

    def write(self) -> int:
        """Convert every node that the plan does not keep; return how many."""
        nodes = [node for node in self._graph if self._touches(node)]
        halves = [node for node in nodes if node not in self._plan.nodes]
        if not halves:
            return 0
        self._retype_values(halves)
        readers = {node: self._wanted(node) for node in nodes}
        self._retype_weights(readers)
        for node, wanted in readers.items():
            for index, value in enumerate(node.inputs):
                if value in self._types and self._types[value] != wanted:
                    node.replace_input_with(index, self._cast(value, node))
        self._retype_outputs()
        return len(halves)

    def _touches(self, node: ir.Node) -> bool:
        """Whether a node computes with float32 values, or moves or makes them."""
        if node.op_type in ("Shape", "Size") and not node.domain:
            return False
        reads = any(value in self._types for value in node.inputs)
        makes = any(value in self._types for value in node.outputs)
        return makes or (reads and node.op_type != "Cast")

    def _wanted(self, node: ir.Node) -> ir.DataType:
        """Return the type in which a node reads."""
        return ir.DataType.FLOAT if node in self._plan.nodes else self._half

    def _retype(self, value: ir.Value) -> None:
        self._types[value] = self._half
        value.type = ir.TensorType(self._half)

    def _retype_values(self, halves: list[ir.Node]) -> None:
        """Give inputs of the cache, and what is computed in 16 bits, their type."""
        for value in self._graph.inputs:
            if value in self._types and self._cached(value):
                self._retype(value)
        for node in halves:
            if node.op_type == "Cast" and not node.domain:
                node.attributes["to"] = ir.AttrInt64("to", int(self._half))
            for value in node.outputs:
                if value in self._types:
                    self._retype(value)

    def _cached(self, value: ir.Value) -> bool:
        return str(value.name).startswith(CACHES) and value.name not in self._plan.wide

    def _retype_weights(self, readers: Mapping[ir.Node, ir.DataType]) -> None:
        """Store weights in 16 bits, unless only float32 reads them and they are small."""
        for value in tuple(self._graph.initializers.values()):
            tensor = value.const_value
            if value not in self._types or value in self._plan.weights or tensor is None:
                continue
            nodes = [node for node in value.consumers() if node in readers]
            if not isinstance(tensor, WeightTensor) and tensor.size == 1:
                self._retype_constant(value, nodes, readers)
            elif any(readers[node] == self._half for node in nodes) or (
                isinstance(tensor, WeightTensor)
                and len(tensor.shape) > 1
                and not any(_moves(node) for node in nodes)
            ):
                exact = any(is_scaling(node) for node in nodes)
                value.const_value = _rounded(tensor, self._dtype, str(value.name), exact)
                self._retype(value)

    def _retype_constant(
        self, value: ir.Value, nodes: Sequence[ir.Node], readers: Mapping[ir.Node, ir.DataType]
    ) -> None:
        """Give 16-bit readers of a number one of their own: no run needs to cast it."""
        assert value.const_value is not None
        for node in nodes:
            if readers[node] == self._half:
                number = constant(self._graph, cast(value.const_value.numpy(), self._dtype))
                for index, read in enumerate(node.inputs):
                    if read is value:
                        node.replace_input_with(index, number)
        if not value.uses() and value.name is not None:
            del self._graph.initializers[value.name]

    def _cast(self, value: ir.Value, reader: ir.Node | None) -> ir.Value:
        """Return a value in its other type, cast once, before its first reader."""
        if value not in self._casts:
            to = self._half if self._types[value] == ir.DataType.FLOAT else ir.DataType.FLOAT
            source = value
            if value in self._plan.masks and to == self._half:
                # Half of the largest number, so that scores may be added to it.
                bound = np.array(limit(self._dtype) / 2, np.float32)
                ends = [constant(self._graph, end) for end in (-bound, bound)]
                source = self._insert(reader, "Clip", [value, *ends], {}, ir.DataType.FLOAT)
            self._casts[value] = self._insert(reader, "Cast", [source], {"to": int(to)}, to)
        return self._casts[value]

    def _insert(
        self,
        before: ir.Node | None,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, Any],
        dtype: ir.DataType,
    ) -> ir.Value:
        """Insert a node in the module of its first input; at the end where nothing reads it."""
        maker = inputs[0].producer()
        path = "" if maker is None else module(maker)
        node = insert(before or self._graph[0], op_type, inputs, attributes, path=path)
        if before is None:
            self._graph.remove(node)
            self._graph.append(node)
        made = node.outputs[0]
        made.type, made.shape = ir.TensorType(dtype), inputs[0].shape
        return made

    def _retype_outputs(self) -> None:
        """Give every output the type its name stands for."""
        for index, value in enumerate(self._graph.outputs):
            wanted = self._half if self._cached(value) else ir.DataType.FLOAT
            if value in self._types and self._types[value] != wanted:
                made = self._cast(value, None)
                value.name, made.name = made.name, value.name
                self._graph.outputs[index] = made


def _moves(node: ir.Node) -> bool:
    return not node.domain and node.op_type in MOVES


def _rounded(tensor: ir.TensorProtocol, dtype: str, name: str, exact: bool) -> WeightTensor:
    """Return the lazy 16-bit form of a weight, or of scales, none of which may move."""
    piece = Piece("", HALF[dtype], tuple(tensor.shape.numpy()))
    round_once = functools.partial(_round, name=name, dtype=dtype, exact=exact)
    return split(tensor, ("cast-half", dtype, exact), round_once, [piece])[0]


def _round(array: Array, *, name: str, dtype: str, exact: bool) -> tuple[Array]:
    with np.errstate(over="ignore"):
        rounded = cast(array, dtype)
    if exact and not np.array_equal(rounded.astype(np.float64), array.astype(np.float64)):
        raise OptionError(
            f"{name} has a number that {dtype} does not hold: weights would not be what they were "
            "rounded for",
            expected=f"scales of {smallest(dtype):.3g} or more, with the digits of {dtype}",
            fix="round them by quantize-qdq with `digits`, and name small ones in `small`",
        )
    if not np.isfinite(rounded).all():
        raise OptionError(
            f"{name} has numbers beyond {limit(dtype):.5g}, where {dtype} ends",
            fix=f"keep {name} in float32, or choose bfloat16",
        )
    return (rounded,)
