"""A written graph cut into the blocks of its model, each of which can run by itself.

A node belongs to the block that its name begins with. What is the same for all blocks (masks,
rotary tables, position biases) is made once, before the blocks or in the first that has the sizes
it needs; what follows from weights or from the cache alone is made wherever it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from eptc.errors import ParityError
from eptc.parity_gate.rounding import DYNAMIC, rounds, without_rounding
from eptc.parity_gate.stored import Quantized, quantized, read

__all__ = ["AFTER", "BEFORE", "PAST", "PRESENT", "Part", "Partition"]

BEFORE = "what comes before the blocks"
AFTER = "what comes after the blocks"
PAST = "past_key_values."
PRESENT = "present."
_FIX = "this is a bug in the lowering or in a graph pass: report it"
# They read the size of their input, none of its numbers.
_SHAPES = ("Shape", "Size")


@dataclasses.dataclass(frozen=True)
class Part:
    """Some nodes of a graph.

    Args:
        name: the block's name, or `BEFORE` or `AFTER`.
        inputs: everything it reads: inputs of the graph, and values that other parts compute.
        state: those of the inputs that stand for the model's state, which follows from the
            tokens; where there are several, the state is their sum.
        outputs: everything it computes for others: outputs of the graph among them.
        result: those of the outputs that other parts read as their state.
        rounds: whether its nodes round activations to 8 bits.
    """

    name: str
    inputs: tuple[str, ...]
    state: tuple[str, ...]
    outputs: tuple[str, ...]
    result: tuple[str, ...]
    rounds: bool


class Partition:
    """The parts of one graph, in the order they run.

    Args:
        path: the graph's file; its weights are not read.
        stacks: names of the blocks of each stack of the model. The stack whose state comes first
            is the graph's own; blocks of another one (T5's decoder, whose keys and values the
            encoder's graph computes) read what comes after the blocks.

    Attributes:
        parts: by name.
        blocks: the graph's own blocks, in order.
        inputs: name and type of each input of the graph.
        outputs: likewise.

    Raises:
        ParityError: blocks are missing, or do not follow one another as in the model.
    """

    def __init__(self, path: Path, stacks: Sequence[Sequence[str]]) -> None:
        self.file = path.name
        self._model = ir.load(path)
        self._graph = self._model.graph
        self.inputs, self.outputs = (
            [(str(v.name), _type(v)) for v in side]
            for side in (self._graph.inputs, self._graph.outputs)
        )
        names = [name for stack in stacks for name in stack]
        self._nodes = list(self._graph)
        self._own = {node: _block(node, names) for node in self._nodes}
        self._known = _depend(self._nodes, {"input_ids"}, through_shapes=False)
        first = next(
            (self._own[n] for n in self._nodes if n in self._known and self._own[n]), None
        )
        self.blocks = next((list(stack) for stack in stacks if first in stack), [])
        others = [name for name in names if name not in self.blocks]
        order = [BEFORE, *self.blocks, AFTER, *others]
        self._rank = {name: rank for rank, name in enumerate(order)}
        self._place = self._placed()
        found = {place for node, place in self._place.items() if node in self._known}
        for name in (BEFORE, *self.blocks, AFTER):
            if name not in found:
                raise ParityError(f"the graph {self.file} has no nodes of {name}", fix=_FIX)
        for value in self._graph.outputs:
            if value.producer() not in self._known:
                raise ParityError(
                    f"the output {value.name} of {self.file} does not follow from the tokens",
                    fix=_FIX,
                )
        self.parts = self._cut([name for name in order if name in found])

    def _placed(self) -> dict[ir.Node, str]:
        """Return the part of each node that has one; others are made wherever they are read."""
        given = {v.name for v in self._graph.inputs}
        cached = {name for name in given if name is not None and name.startswith(PAST)}
        of_cache = _depend(self._nodes, cached, through_shapes=False)
        of_inputs = _depend(self._nodes, {str(name) for name in given}, through_shapes=True)
        place: dict[ir.Node, str] = {}
        for node in self._nodes:
            before = {place[p] for p in _producers(node) if p in place}
            latest = max(before, key=self._rank.__getitem__, default=BEFORE)
            if node in self._known:
                place[node] = self._own[node] or self._follow(latest)
            elif node in of_inputs and node not in of_cache:
                made = [p for p in _producers(node) if p in of_inputs]
                if all(p in place for p in made):
                    place[node] = latest  # as early as the sizes it reads are known
        for node in [node for node in place if node.op_type == DYNAMIC]:
            if len({place[reader] for reader in node.successors()}) > 1:
                # Blocks that read one state share what rounds it: each rounds it for itself.
                del place[node]
        return place

    def _follow(self, latest: str) -> str:
        """Return the part of a node outside of the blocks that reads the state of a part."""
        return AFTER if latest in self.blocks else latest

    def _cut(self, names: Sequence[str]) -> dict[str, Part]:
        reads, nodes = {}, {}
        for name in names:
            reads[name], nodes[name] = self._reads(name)
        read = {v for values in reads.values() for v in values}
        parts = {}
        for name in names:
            state = [v for v in reads[name] if v.producer() in self._known]
            self._check_order(name, state)
            outputs = [
                v
                for node in self._nodes
                if self._place.get(node) == name
                for v in node.outputs
                if v in read or v.is_graph_output()
            ]
            parts[name] = Part(
                name,
                tuple(str(v.name) for v in reads[name]),
                tuple(str(v.name) for v in state),
                tuple(str(v.name) for v in outputs),
                tuple(str(v.name) for v in outputs if v in read and v.producer() in self._known),
                rounds(nodes[name]),
            )
        return parts

    def _reads(self, name: str) -> tuple[list[ir.Value], set[ir.Node]]:
        """Return what a part reads from outside, in the order of its nodes, and those nodes."""
        reads: dict[ir.Value, None] = {}
        pending = [node for node in reversed(self._nodes) if self._place.get(node) == name]
        seen: set[ir.Node] = set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            for value in node.inputs:
                if value is None or value.is_initializer():
                    continue
                producer = value.producer()
                if producer is None or self._place.get(producer, name) != name:
                    reads.setdefault(value)
                else:
                    pending.append(producer)
        return list(reads), seen

    def _check_order(self, name: str, state: Sequence[ir.Value]) -> None:
        """Check that a part reads the state of the part before it, and of no other."""
        if name == BEFORE:
            return
        wanted = AFTER
        if name in self.blocks or name == AFTER:
            wanted = [BEFORE, *self.blocks, AFTER][self._rank[name] - 1]
        for value in state:
            producer = value.producer()
            assert producer is not None
            if self._place[producer] != wanted or (value.name or "").startswith(PRESENT):
                raise ParityError(
                    f"in the graph {self.file}, {name} reads {value.name}, which "
                    f"{self._place[producer]} computes",
                    expected=f"that it reads the state of {wanted} alone",
                    fix=_FIX,
                )

    @property
    def weights(self) -> list[str]:
        """Names of the weights and constants."""
        return list(self._graph.initializers)

    @property
    def narrow(self) -> dict[str, str]:
        """Names and types of the weights that are stored in 16 bits."""
        return {
            name: str(value.dtype.numpy())
            for name, value in self._graph.initializers.items()
            if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        }

    @property
    def quantized(self) -> dict[str, Quantized]:
        """The weights that are stored as integers, by name."""
        return {weight.name: weight for weight in quantized(self._graph)}

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a copy of a weight; its file is not held open."""
        tensor = self._graph.initializers[name].const_value
        assert tensor is not None
        return read(tensor)

    def serialize(
        self, part: Part, arrays: Mapping[str, np.ndarray[Any, Any]], *, published: bool = False
    ) -> bytes:
        """Return a part as an ONNX model whose weights stay where the graph's are.

        Args:
            part: one of the parts.
            arrays: what it reads, for the types of values between parts.
            published: whether nodes are those of the file; else activations that they would round
                to 8 bits stay float32: that rounding would hide what else is wrong.
        """
        graph = ir.convenience.extract(self._graph, part.inputs, part.outputs)
        if not published:
            without_rounding(graph)
        declared = {value.name for value in self._graph.inputs}
        for value in graph.inputs:
            if value.name not in declared:
                array = arrays[str(value.name)]
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
                width = [array.shape[-1] if value.name in part.state else None]
                value.shape = ir.Shape([None] * (array.ndim - 1) + width)
        model = ir.Model(
            graph,
            ir_version=self._model.ir_version,
            functions=list(self._model.functions.values()),
        )
        content: bytes = ir.to_proto(model).SerializeToString()
        return content


def _block(node: ir.Node, names: Iterable[str]) -> str | None:
    """Return the block a node's name begins with."""
    module = (node.name or "").rpartition("/")[0]
    return next((n for n in names if module == n or module.startswith(f"{n}.")), None)


def _type(value: ir.Value) -> str | None:
    return None if value.dtype is None else str(value.dtype.numpy())


def _producers(node: ir.Node) -> list[ir.Node]:
    found = (value.producer() for value in node.inputs if value is not None)
    return [producer for producer in found if producer is not None]


def _depend(nodes: Iterable[ir.Node], inputs: set[str], *, through_shapes: bool) -> set[ir.Node]:
    """Return the nodes whose outputs follow from some inputs of the graph."""
    found: set[ir.Node] = set()
    for node in nodes:
        if node.op_type in _SHAPES and not through_shapes:
            continue
        for value in node.inputs:
            if value is None:
                continue
            producer = value.producer()
            if producer in found or (producer is None and value.name in inputs):
                found.add(node)
    return found
