"""Weights that an engine stores as integers, decoded by code of the gate's own.

What a graph's own nodes say counts, not what wrote it. Two forms are known:

* blocks: what MatMulNBits or GatherBlockQuantized reads, as ONNX Runtime describes them;
* plain: `w` [in, out] in 8 bits with `w@scale` [out]; where its rows are looked up, [rows, width]
  with [rows]. `w@zero_point` is as its scale; without one zero is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from eptc.errors import ParityError
from eptc.lower.weights import PART

__all__ = ["Decoder", "Quantized", "Rows", "quantized", "read"]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
# Inputs of each kernel: integers, scales, zero points.
_KERNELS = {
    ("com.microsoft", "MatMulNBits", ""): (1, 2, 3),
    ("com.microsoft", "GatherBlockQuantized", ""): (0, 2, 3),
}
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a weight as they are stored.

    Args:
        numbers: what the integers stand for, [rows, columns].
        steps: how far apart two neighbouring numbers are, [rows, columns].
        low: the smallest number there could be, [rows, columns].
        high: the largest, [rows, columns].
    """

    numbers: Float64
    steps: Float64
    low: Float64
    high: Float64


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The integers of a weight in memory, the way round the reference has it: [out, in].

    Args:
        integers: as they are stored, [rows, bytes]; of two in a byte the first has the lower half.
        scales: [rows, groups].
        zeros: [rows, groups].
        bits: of an integer.
        group: how many neighbours in a row share a scale.
        columns: numbers in a row.
        filled: whether the last group may be filled up beyond the weight's own columns.
        levels: how many steps the range of a group has, at least.
        fitted: whether that range goes from the group's smallest number, or zero, to its largest,
            or zero; else it is as wide below zero as above.
    """

    integers: Array
    scales: Float64
    zeros: Float64
    bits: int
    group: int
    columns: int
    filled: bool
    levels: int
    fitted: bool

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.integers)

    def part(self, start: int, count: int) -> Decoder:
        """Return a weight of some of the rows."""
        part = slice(start, start + count)
        return dataclasses.replace(
            self, integers=self.integers[part], scales=self.scales[part], zeros=self.zeros[part]
        )

    def rows(self, part: slice, columns: int) -> Rows:
        """Decode the first columns of some rows."""
        lowest = -(2 ** (self.bits - 1)) if self.integers.dtype == np.int8 else 0
        steps, zeros = (
            np.repeat(each[part], self.group, axis=1)[:, :columns]
            for each in (self.scales, self.zeros)
        )
        numbers = _unpacked(self.integers[part], self.bits)[:, :columns] - zeros
        return Rows(
            numbers * steps,
            steps,
            (lowest - zeros) * steps,
            (lowest + 2**self.bits - 1 - zeros) * steps,
        )


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight stored as integers; equal where integers are read in the same way.

    Args:
        name: the weight's, which is that of the integers.
        form: how they are read: shape, bits, group, names of scales and zero points.
        open: reads what is stored; raises ParityError where its shape is not what the graph says.
    """

    name: str
    form: tuple[object, ...]
    open: Callable[[], Decoder] = dataclasses.field(compare=False, repr=False)


def read(tensor: ir.TensorProtocol) -> Array:
    """Return a copy of a tensor's numbers; its file is not held open."""
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def quantized(graph: ir.Graph) -> Iterator[Quantized]:
    """Yield the weights of a graph that are stored as integers, once for each way of reading.

    Raises:
        ParityError: a node does not say how its weight is to be read.
    """
    found: dict[Quantized, None] = {}
    for node in graph:
        if node.op_identifier() in _KERNELS:
            found.setdefault(_blocks(node))
    for name, value in graph.initializers.items():
        blocks = any(name == other.name for other in found)
        if (
            value.dtype in _EIGHT_BITS
            and f"{name}{PART}scale" in graph.initializers
            and not blocks
        ):
            found.setdefault(_plain(value, graph))
    yield from found


def _blocks(node: ir.Node) -> Quantized:
    """Return what a kernel for blocks reads."""
    bits, group, rows, columns = (
        node.attributes.get_int(name, 0) for name in ("bits", "block_size", "N", "K")
    )
    integers, scales, zeros = (_constant(node, index) for index in _KERNELS[node.op_identifier()])
    if bits not in (4, 8) or group < 1 or integers is None or scales is None:
        raise ParityError(
            f"{node.name} reads blocks of {group} numbers of {bits} bits that are no weights",
            expected="initializers with 4 or 8 bits to a number",
            fix="this is a bug in the pass that quantises: report it",
        )
    if node.op_type == "GatherBlockQuantized":
        shape = _shape(integers)
        rows, columns = shape[0], int(np.prod(shape[1:])) * 8 // bits
    groups = -(-columns // group)

    def load() -> Decoder:
        middle = np.full((rows, groups), 2.0 ** (bits - 1))
        if zeros is not None:
            packed = _shaped(zeros, (rows, -(-groups * bits // 8)))
            middle = _unpacked(packed, bits)[:, :groups].astype(np.float64)
        return Decoder(
            _shaped(integers, (rows, groups * group * bits // 8)),
            _shaped(scales, (rows, groups)).astype(np.float64),
            middle, bits, group, columns,
            filled=node.op_type == "GatherBlockQuantized",
            levels=2**bits - (1 if zeros is not None else 2),
            fitted=zeros is not None,
        )  # fmt: skip

    form = rows, groups, bits, group, scales.name, None if zeros is None else zeros.name
    return Quantized(str(integers.name), form, load)


def _plain(value: ir.Value, graph: ir.Graph) -> Quantized:
    """Return a weight with a scale for each output, or for each row that is looked up."""
    by_row = any(_reads_rows(node) for node in value.consumers())
    shape = _shape(value)
    if len(shape) != 2:
        raise ParityError(f"the weight {value.name} in the engine has the shape {list(shape)}")
    rows, columns = shape if by_row else shape[::-1]
    scales = graph.initializers[f"{value.name}{PART}scale"]
    zeros = graph.initializers.get(f"{value.name}{PART}zero_point")

    def load() -> Decoder:
        integers = _shaped(value, shape)
        middle = np.zeros((rows, 1)) if zeros is None else _shaped(zeros, (rows, 1))
        return Decoder(
            integers if by_row else integers.T,
            _shaped(scales, (rows, 1)).astype(np.float64),
            middle.astype(np.float64), 8, columns, columns,
            filled=False,
            levels=126,  # Some kernels add up products of 8 bits in 16, and want numbers of 7.
            fitted=False,
        )  # fmt: skip

    return Quantized(str(value.name), (rows, columns, by_row), load)


def _reads_rows(node: ir.Node) -> bool:
    """Whether a node reads a table by row: a look-up, or the head that is the table transposed."""
    if node.op_type == "DequantizeLinear":
        return node.attributes.get_int("axis", 1) == 0
    return node.op_type in ("Gather", "Transpose")


def _constant(node: ir.Node, index: int) -> ir.Value | None:
    """Return the initializer that a node reads, by way of a Reshape too."""
    value = node.inputs[index] if index < len(node.inputs) else None
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_identifier() == ("", "Reshape", ""):
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _shaped(value: ir.Value, shape: tuple[int, ...]) -> Array:
    """Return an initializer's numbers in a shape of as many numbers.

    Raises:
        ParityError: it has more or fewer.
    """
    assert value.const_value is not None
    array = read(value.const_value)
    if array.size != np.prod(shape):
        raise ParityError(
            f"the weight {value.name} in the engine has the shape {list(array.shape)}",
            expected=f"{list(shape)}, as what reads it says",
            fix="this is a bug in the pass that quantises: report it",
        )
    return array.reshape(shape)


def _unpacked(array: Array, bits: int) -> Array:
    """Return the integers of each row: of two in a byte, the lower half first."""
    if bits == 8:
        return array
    return np.stack([array & 15, array >> 4], axis=-1).reshape(len(array), -1)
