"""What of a graph stays in float32 when the rest is computed in 16 bits, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from eptc.lower.edit import MICROSOFT
from eptc.lower.element_types import element_types
from eptc.lower.half_norms import around_means
from eptc.lower.half_plan import HalfPlan
from eptc.lower.half_scales import lossy_scales
from eptc.lower.naming import CHOICE, chooses_experts
from eptc.lower.sharing import is_scaling, quantized_from, sharing
from eptc.lower.weights import PACKED, WeightTensor
from eptc.tensors import cast, limit, unit_roundoff

__all__ = ["CACHES", "HALF", "MOVES", "plan_half"]

HALF = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# What the names of a cache's inputs and outputs begin with.
CACHES = ("past_key_values.", "present.")
# Operators that move numbers and change none.
MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
})  # fmt: skip
# Operators with float16 and bfloat16 kernels in ONNX Runtime's CUDA provider whose sums are in
# float32 inside. What is not listed stays in float32.
_COMPUTES = frozenset({
    ("", "Add"), ("", "Cast"), ("", "Div"), ("", "Erf"), ("", "Gelu"), ("", "Gemm"),
    ("", "LayerNormalization"), ("", "MatMul"), ("", "Mul"), ("", "Neg"), ("", "Relu"),
    ("", "Sigmoid"), ("", "Sqrt"), ("", "Sub"), ("", "Tanh"),
    (MICROSOFT, "MultiHeadAttention"), (MICROSOFT, "RotaryEmbedding"),
})  # fmt: skip
# Operators that any type of input suits, for none of its numbers is read.
_BLIND = frozenset({"Shape", "Size", "Cast"})
_MASKING = MOVES | {"Add", "Cast", "Clip", "Max", "Min", "Mul", "Pad", "Sub", "Where"}
_ACTIVATIONS = frozenset({"Gelu", "Mul", "Relu", "Sigmoid", "Tanh"})
# What makes numbers as large as those it reads.
_ADDS = frozenset({("", "Add", ""), ("", "Sub", "")})
# Bytes of a constant that may be read while a graph is rewritten.
_SMALL = 1024


def plan_half(
    model: ir.Model,
    dtype: str,
    ranges: Mapping[str, float],
    *,
    safety: float,
    keep: tuple[str, ...],
    small: tuple[str, ...] = (),
) -> HalfPlan:
    """Return what stays in float32; the graph is left as it is, and no weight is read.

    Args:
        model: a graph in float32 whose nodes have names.
        dtype: `float16` or `bfloat16`.
        ranges: largest magnitude of values and weights by name; one that is not there is taken to
            fit.
        safety: how many times larger than what was observed a value must still fit; a weight
            only has to fit as it is.
        keep: parameters that stay float32.
        small: 8-bit weights with scales below the smallest number that has all its digits.
    """
    return _Planner(model, dtype, ranges, safety, frozenset(keep), frozenset(small)).plan()


class _Planner:
    """Gathers reasons; the first one a node is given stays."""

    def __init__(
        self,
        model: ir.Model,
        dtype: str,
        ranges: Mapping[str, float],
        safety: float,
        keep: frozenset[str],
        small: frozenset[str],
    ) -> None:
        self.graph = model.graph
        self.dtype = dtype
        self.types = element_types(model)
        self.nodes = [node for node in model.graph if self._is_float(node)]
        self.kept: dict[ir.Node, str] = {}
        self.weights: dict[ir.Value, str] = {}
        self._names = keep
        self._small = small
        self._limit = limit(dtype)
        self._bound = self._limit / safety if dtype == "float16" else np.inf
        self._safety = safety
        self._ranges = ranges

    def plan(self) -> HalfPlan:
        # What is special before what is general: the first reason stays.
        self._weights()
        self._routers()
        self._norms()
        self._angles()
        self._t5_outputs()
        self._head()
        for node, reason in lossy_scales(self.graph, self.dtype, self._ranges, self._small):
            self._keep(node, reason)
        masks = self._masks()
        self._operators()
        wide = self._ranged(masks)
        self._shared()
        self._moves()
        kept = {node: self.kept[node] for node in self.nodes if node in self.kept}
        return HalfPlan(kept, frozenset(masks), wide, self.weights, self.types)

    def _is_float(self, node: ir.Node) -> bool:
        blind = node.op_type in _BLIND and not node.domain
        return bool(self._single(node.outputs) or (self._single(node.inputs) and not blind))

    def _single(self, values: Sequence[ir.Value | None]) -> list[ir.Value]:
        return [v for v in values if v is not None and self.types.get(v) == ir.DataType.FLOAT]

    def _keep(self, node: ir.Node | None, reason: str) -> None:
        if node is not None:
            self.kept.setdefault(node, reason)

    def _constants(self, node: ir.Node) -> Iterator[np.ndarray]:
        """Yield the few numbers of each constant that a node reads; a weight is not read."""
        for value in self._single(node.inputs):
            tensor = value.const_value
            if tensor is None or isinstance(tensor, WeightTensor) or tensor.nbytes > _SMALL:
                continue
            yield tensor.numpy()

    def _masks(self) -> set[ir.Value]:
        """Keep what reads constants that 16 bits cannot hold; return what masks are made of."""
        masks: set[ir.Value] = set()
        for node in self.nodes:
            for constant in self._constants(node):
                with np.errstate(over="ignore"):
                    rounded = cast(constant, self.dtype).astype(np.float64)
                roundoff = 2 * unit_roundoff(self.dtype)
                if (np.abs(constant) > self._limit).any():
                    self._keep(node, "a constant beyond what 16 bits hold")
                    if constant.size == 1 and node.op_type in _MASKING:
                        masks.update(self._single(node.outputs))
                elif not np.allclose(rounded, constant, rtol=roundoff, atol=0):
                    self._keep(node, "a constant too small for 16 bits")
            if node.op_type in _MASKING and masks & set(node.inputs):
                self._keep(node, "a mask of numbers beyond what 16 bits hold")
                masks.update(self._single(node.outputs))
        return masks

    def _operators(self) -> None:
        for node in self.nodes:
            if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
                self._keep(node, "it has a graph of its own")
            elif node.op_type in ("Softmax", "LogSoftmax"):
                self._keep(node, "softmax: its sum has many small terms")
            elif not (
                (node.domain, node.op_type) in _COMPUTES
                or self._moves_only(node)
                or (is_scaling(node) and self.dtype == "float16")
            ):
                self._keep(node, f"{node.op_type} has no 16-bit kernel everywhere")
            for value in self._single(node.outputs):
                if any(reader.graph is not self.graph for reader in value.consumers()):
                    self._keep(node, "a graph inside a node reads it")

    def _routers(self) -> None:
        for node in self.nodes:
            if chooses_experts(node.name):
                self._keep(node, CHOICE)

    def _weights(self) -> None:
        for value in self.graph.initializers.values():
            if self.types.get(value) != ir.DataType.FLOAT:
                continue
            name, magnitude = str(value.name), self._ranges.get(str(value.name), 0.0)
            if chooses_experts(name):
                self.weights[value] = CHOICE
            elif self._names & {name, *name.split(PACKED)}:
                self.weights[value] = "kept as asked"
                for node in value.consumers():
                    self._keep(node, f"{name} is kept as asked")
            elif magnitude > self._limit:
                reason = f"numbers up to {magnitude:.3g}, beyond {self._limit:.5g}"
                self.weights[value] = reason
                self._readers(value, f"{name} has {reason}")
            elif (
                value.is_graph_input()
                or value.is_graph_output()
                or any(node.graph is not self.graph for node in value.consumers())
            ):
                self.weights[value] = "a caller, or a graph inside a node, reads it"

    def _shared(self) -> None:
        """Keep all that shares a scale with what is kept."""
        for group in sharing(self.graph):
            for reason in [self.kept[node] for node in group if node in self.kept][:1]:
                for node in group:
                    self._keep(node, reason)

    def _readers(self, value: ir.Value, reason: str) -> None:
        """Keep what computes with the numbers of a value, moved and added to others too.

        Of a table, the rows that are too large may be none that was looked up in any text.
        """
        waiting, seen = [value], {value}
        while waiting:
            for node in waiting.pop().consumers():
                self._keep(node, reason)
                if self._moves_only(node) or node.op_identifier() in _ADDS:
                    new = [output for output in node.outputs if output not in seen]
                    waiting += new
                    seen.update(new)

    def _norms(self) -> None:
        """Keep each sequence of nodes around a mean: the squares may overflow."""
        for node in around_means(self.nodes):
            self._keep(node, "a norm: squares, their mean and its root")

    def _angles(self) -> None:
        """Keep what sines and cosines are made of: large angles need every digit."""
        waiting = [node for node in self.nodes if node.op_type in ("Cos", "Sin")]
        while waiting:
            node = waiting.pop()
            if node not in self.kept:
                self._keep(node, "angles of positions")
                makers = [value.producer() for value in self._single(node.inputs)]
                waiting += [maker for maker in makers if maker is not None]

    def _t5_outputs(self) -> None:
        """Keep T5's second feed-forward projection and what feeds it, which pass 65504."""
        if self.dtype != "float16":
            return
        for node in (node for node in self.nodes if node.op_type == "MatMul"):
            x, weight = (None if v is None else quantized_from(v) for v in node.inputs)
            if x is None or weight is None or not str(weight.name).endswith(".wo.weight"):
                continue
            self._keep(node, "T5's wo: what it reads and makes grows beyond float16")
            feeder = x.producer()
            if feeder is not None and feeder.op_type in _ACTIVATIONS:
                self._keep(feeder, "it feeds T5's wo")

    def _head(self) -> None:
        """Keep the logits and the product that makes them."""
        for output in self.graph.outputs:
            value: ir.Value | None = output if output.name == "logits" else None
            while value is not None and (node := value.producer()) is not None:
                self._keep(node, "the logits")
                if node.op_type in ("Gemm", "MatMul"):
                    break
                value = next(iter(self._single(node.inputs)), None)

    def _ranged(self, masks: set[ir.Value]) -> dict[str, str]:
        """Keep what makes or reads a value that does not fit; return the caches that do not."""
        caches = [*self.graph.inputs, *self.graph.outputs]
        cached = {str(v.name) for v in caches if str(v.name).startswith(CACHES)}
        wide: dict[str, str] = {}
        for value in (*self.graph.inputs, *(v for node in self.nodes for v in node.outputs)):
            name, magnitude = str(value.name), self._ranges.get(str(value.name), 0.0)
            single = self.types.get(value) == ir.DataType.FLOAT
            if magnitude <= self._bound or value in masks or not single:
                continue
            reason = (
                f"{name} reaches {magnitude:.3g}; {self._safety:g} times that is beyond "
                f"{self._limit:.5g}"
            )
            readers = [node for node in value.consumers() if node.op_type not in _BLIND]
            for node in (*self._makers(value), *readers):
                self._keep(node, reason)
            if name in cached:
                # What one run puts into a cache the next one takes out of it.
                twins = {side + name.partition(".")[2] for side in CACHES}
                wide |= dict.fromkeys(sorted(twins & cached), reason)
        return wide

    def _makers(self, value: ir.Value) -> Iterator[ir.Node | None]:
        """Yield what makes a value, and parts of the sum it is that were not observed."""
        maker = value.producer()
        yield maker
        if maker is not None and maker.op_identifier() in _ADDS:
            parts = [part for part in self._single(maker.inputs) if part.name not in self._ranges]
            yield from (part.producer() for part in parts)

    def _moves_only(self, node: ir.Node) -> bool:
        return not node.domain and node.op_type in MOVES

    def _moves(self) -> None:
        """Let numbers that are moved stay what they are, so that no cast is undone by the next."""
        for node in self.nodes:
            makers = [value.producer() for value in self._single(node.inputs)]
            if self._moves_only(node) and makers and all(maker in self.kept for maker in makers):
                self._keep(node, "it moves numbers that are float32")
