"""Store matrices as 4- or 8-bit integers in blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from eptc.errors import OptionError
from eptc.lower.blocks import Blocks, Method
from eptc.lower.edit import MICROSOFT, constant, drop, insert, replace
from eptc.lower.naming import CHOICE, chooses_experts
from eptc.lower.weights import PACKED, Piece, WeightTensor, split
from eptc.pass_base import QuantizingPass
from eptc.tensors import Array

__all__ = ["QuantizeWeights"]


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(QuantizingPass):
    """Store matrices as 4- or 8-bit integers in blocks.

    Before: y = MatMul(x, W)                     W [in, out] float32
            e = Gather(E, ids)                   E [rows, width] float32
            z = MatMul(x, Transpose(E))          where the embedding is also the head
    After:  y = MatMulNBits(x, W, W@scale, W@zero_point)           W [out, blocks, bytes] uint8
            e = GatherBlockQuantized(E, ids, E@scale, E@zero_point)  E [rows, blocks * bytes]
            z = MatMulNBits(x, Reshape(E), E@scale, E@zero_point)

    Lossy. Each output's weights, and each row of a table, are cut into blocks along in or width
    that have a scale and a zero point each, @scale [out, blocks] float32. Graphs that read the
    same embedding share one copy. Integers keep the weight's name. Each is the nearest to the
    weight as it was folded, in float64: quantising before folding would round twice.

    Main graph only. A matrix is left alone, its reason logged at DEBUG, where it is not bound,
    is kept, has rows shorter than a block, a caller can set or read it, something else
    reads it, or its readers want it in two layouts. So is a table whose rows have an odd number
    of 4-bit blocks: ONNX Runtime 1.23 and 1.24 read other zero points than are stored.

    Beside these options it has those of `QuantizingPass`: `keep` and `only`.

    Args:
        bits: of an integer, 4 or 8.
        block_size: numbers that share a scale, a power of two, 16 or more.
        method: how scales are chosen (`Blocks`).
        accuracy_level: MatMulNBits's attribute: 4 rounds activations to 8-bit integers, in blocks
            too; 0 computes in float32.
    """

    name: ClassVar[str] = "quantize-weights"

    bits: Literal[4, 8] = 4
    block_size: int = 32
    method: Method = "rtn"
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: a value that the kernels do not take.
        """
        size = self.block_size
        for name, value, sound, known in (
            ("bits", self.bits, self.bits in (4, 8), "4 or 8"),
            ("block_size", size, size >= 16 and not size & (size - 1), "a power of 2, 16 or more"),
            ("method", self.method, self.method in ("rtn", "k-quant"), "rtn or k-quant"),
            ("accuracy_level", self.accuracy_level, self.accuracy_level in range(5), "0 to 4"),
        ):
            if not sound:
                raise OptionError(f"{self.name}: {name} is {value!r}", expected=known)
        super().__post_init__()

    def plan(self, model: ir.Model) -> dict[str, str]:
        """Return why each weight that stays float32 does, by its name."""
        return {str(w.name): why for w, why in self._weights(model.graph) if isinstance(why, str)}

    def rewrite(self, model: ir.Model) -> int:
        """Quantise every matrix that can be; return how many were."""
        quantised = 0
        for weight, found in self._weights(model.graph):
            if isinstance(found, str):
                self.left(str(weight.name), found)
                continue
            self._quantize(weight, found, model.graph)
            quantised += 1
        if quantised:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return quantised

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self.bits, self.block_size, self.method)

    def _weights(self, graph: ir.Graph) -> Iterator[tuple[ir.Value, _Readers | str]]:
        """Yield each float32 weight with what reads it, or why it cannot be integers."""
        for weight in tuple(graph.initializers.values()):
            tensor = weight.const_value
            if not isinstance(tensor, WeightTensor) or tensor.dtype != ir.DataType.FLOAT:
                continue  # A constant of the graph, or stored in fewer bits already.
            if len(tensor.shape) != 2:
                yield weight, "it is no matrix"
                continue
            found = self._kept(weight) or _readers(weight, graph)
            if isinstance(found, _Readers):
                found = self._misfit(tensor, found) or found
            yield weight, found

    def _kept(self, weight: ir.Value) -> str | None:
        """Return why a weight is not to be quantised; None where it is."""
        names = {str(weight.name), *str(weight.name).split(PACKED)}
        if chooses_experts(weight.name):
            return CHOICE
        if not names.isdisjoint(self.keep):
            return "it is to be kept"
        if self.only is not None and names.isdisjoint(self.only):
            return "others are to be quantised"
        return None

    def _misfit(self, tensor: ir.TensorProtocol, readers: _Readers) -> str | None:
        columns = readers.shape(tensor)[1]
        if columns < self.block_size:
            return f"its rows of {columns} are shorter than a block"
        if readers.lookups and self.bits == 4 and self._blocks.count(columns) % 2:
            return "its rows have an odd number of blocks, which some kernels read wrongly"
        return None

    def _quantize(self, weight: ir.Value, readers: _Readers, graph: ir.Graph) -> None:
        tensor = weight.const_value
        assert tensor is not None
        rows, columns = readers.shape(tensor)
        blocks, name = self._blocks, str(weight.name)
        codes, scales, zeros = blocks.shapes(rows, columns)
        # What both kernels read is stored for the one that looks rows up.
        stored = (rows, codes[1] * codes[2]) if readers.lookups else codes

        def compute(array: Array) -> tuple[Array, ...]:
            matrix = array if readers.by_row else array.T
            integers, *others = blocks.quantize(matrix, name)
            return integers.reshape(stored), *others

        parts = split(
            tensor,
            ("blocks", blocks, readers.by_row, stored),
            compute,
            [
                Piece("", ir.DataType.UINT8, stored),
                Piece("scale", ir.DataType.FLOAT, scales),
                Piece("zero_point", ir.DataType.UINT8, zeros),
            ],
        )
        values = [weight, *(ir.Value(name=part.name) for part in parts[1:])]
        for value, part in zip(values, parts, strict=True):
            # A type of its own: copies of a graph share theirs.
            value.const_value, value.type = part, ir.TensorType(part.dtype)
            value.shape = ir.Shape(part.shape.numpy())
        for value in values[1:]:
            graph.register_initializer(value)
        attributes = {"bits": self.bits, "block_size": self.block_size}
        for node in readers.lookups:
            _look_up(node, values, attributes, columns, graph)
        attributes |= {"K": columns, "N": rows}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        for node in readers.products:
            integers = values[0]
            if readers.lookups:
                target = constant(graph, np.array(codes, np.int64))
                integers = insert(node, "Reshape", [integers, target]).outputs[0]
                integers.shape = ir.Shape(codes)
            new = insert(
                node, "MatMulNBits", [node.inputs[0], integers, *values[1:]], attributes,
                domain=MICROSOFT,
            )  # fmt: skip
            replace(node.outputs[0], new.outputs[0])
            drop(node.outputs[0])


@dataclasses.dataclass(frozen=True)
class _Readers:
    """What reads a matrix.

    Args:
        products: MatMuls that multiply by it, or by its transpose.
        lookups: Gathers of its rows.
        by_row: whether its rows are what is cut into blocks; else its columns are.
    """

    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]
    by_row: bool

    def shape(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """Return how many rows are cut into blocks, and how long they are."""
        rows, columns = tensor.shape.numpy()
        return (rows, columns) if self.by_row else (columns, rows)


def _readers(weight: ir.Value, graph: ir.Graph) -> _Readers | str:
    """Return what reads a matrix, or why it cannot be quantised."""
    if weight.is_graph_input() or weight.is_graph_output():
        return "a caller can set or read it"
    products: list[ir.Node] = []
    transposed: list[ir.Node] = []
    lookups: list[ir.Node] = []
    for node, index in weight.uses():
        if node.graph is not graph:
            return "a subgraph reads it"
        output = node.outputs[0]
        if _multiplies(node, index):
            products.append(node)
        elif node.op_identifier() == ("", "Gather", "") and not index and _by_row(node):
            lookups.append(node)
        elif _transposes(node) and not output.is_graph_output():
            if not all(_multiplies(*use) and use.node.graph is graph for use in output.uses()):
                return f"its transpose is not only multiplied by, in {node.name}"
            transposed += [reader for reader, _ in output.uses()]
        else:
            return f"{node.op_type} reads it"
    if products and (transposed or lookups):
        return "its readers want it in two layouts"
    if not products and not transposed and not lookups:
        return "nothing reads it"
    return _Readers(tuple(products or transposed), tuple(lookups), by_row=not products)


def _multiplies(node: ir.Node, index: int) -> bool:
    """Whether a node multiplies rows by what it reads there."""
    left = node.inputs[0] if node.inputs else None
    return (
        node.op_identifier() == ("", "MatMul", "")
        and index == 1
        and left is not None
        and (left.shape is None or len(left.shape) > 1)
    )


def _by_row(node: ir.Node) -> bool:
    return node.attributes.get_int("axis", 0) in (0, -2)


def _transposes(node: ir.Node) -> bool:
    permutation = node.attributes.get_ints("perm", (1, 0))
    return node.op_identifier() == ("", "Transpose", "") and tuple(permutation) == (1, 0)


def _look_up(
    node: ir.Node,
    values: list[ir.Value],
    attributes: dict[str, Any],
    columns: int,
    graph: ir.Graph,
) -> None:
    """Put the kernel for stored blocks in the place of a Gather."""
    inputs = [values[0], node.inputs[1], *values[1:]]
    axes = {"gather_axis": 0, "quantize_axis": 1}
    new = insert(node, "GatherBlockQuantized", inputs, {**attributes, **axes}, domain=MICROSOFT)
    result = new.outputs[0]
    if columns % attributes["block_size"]:
        # The last block is looked up with what fills it.
        result.type, shape = node.outputs[0].type, node.outputs[0].shape
        padded = -(-columns // attributes["block_size"]) * attributes["block_size"]
        result.shape = None if shape is None else ir.Shape([*shape[:-1], padded])
        ends = [constant(graph, np.array([n], np.int64)) for n in (0, columns, -1)]
        result = insert(node, "Slice", [result, *ends]).outputs[0]
    replace(node.outputs[0], result)
    drop(node.outputs[0])
