"""Weights that an engine stores in 8 bits or fewer, decoded by code of the gate's own.

What a graph's own nodes say counts, not what wrote it. Three forms are known:

* blocks: what MatMulNBits or GatherBlockQuantized reads, as ONNX Runtime describes them;
* dequantized: what DequantizeLinear reads, 8-bit integers or floating point, by its own inputs: a
  scale for each index of `axis`, or one for all;
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
from eptc.parity_gate import float8

__all__ = ["Decoder", "Quantized", "Rows", "quantized", "read"]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
# Inputs of each kernel: integers, scales, zero points.
_KERNELS = {
    ("com.microsoft", "MatMulNBits", ""): (1, 2, 3),
    ("com.microsoft", "GatherBlockQuantized", ""): (0, 2, 3),
}
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
_FLOAT8 = ir.DataType.FLOAT8E4M3FN


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
        levels: how many steps the range of a group has, at least; None where steps are as large
            as the numbers they are between.
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
    levels: int | None
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
class Float8Decoder(Decoder):
    """The same of 8-bit floating point; `integers` are its bytes."""

    def rows(self, part: slice, columns: int) -> Rows:
        """Decode the first columns of some rows; nothing may be beyond the largest number."""
        codes, scales = self.integers[part, :columns], self.scales[part]
        found = float8.numbers(codes) * scales
        ends = np.full_like(found, np.inf)
        return Rows(found, float8.spacing(codes) * scales, -ends, ends)


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
        elif (weight := _dequantized(node)) is not None:
            found.setdefault(weight)
    for name, value in graph.initializers.items():
        known = any(name == other.name for other in found)
        if value.dtype in _EIGHT_BITS and f"{name}{PART}scale" in graph.initializers and not known:
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


def _dequantized(node: ir.Node) -> Quantized | None:
    """Return the matrix that a DequantizeLinear reads; None where it reads none."""
    value = node.inputs[0] if node.op_identifier() == ("", "DequantizeLinear", "") else None
    if value is None or not value.is_initializer() or len(shape := _shape(value)) != 2:
        return None
    scales, zeros = _constant(node, 1), _constant(node, 2)
    float8s = value.dtype == _FLOAT8
    if scales is None or (len(node.inputs) > 2 and zeros is None):
        raise ParityError(
            f"{node.name} reads {value.name} with a scale or a zero point that a run computes",
            expected="initializers",
            fix="this is a bug in the pass that quantises: report it",
        )
    if _shape(scales):
        by_row = node.attributes.get_int("axis", 1) % 2 == 0
    else:  # one for all: what is turned afterwards has a row for each output
        by_row = any(map(_reads_rows, _readers(node.outputs[0])))
    rows, columns = shape if by_row else shape[::-1]

    def load() -> Decoder:
        codes = _shaped(value, shape)
        codes = codes.view(np.uint8) if float8s else codes
        kind = Float8Decoder if float8s else Decoder
        found = kind(
            codes if by_row else codes.T,
            _spread(scales, rows),
            np.zeros((rows, 1)) if zeros is None else _spread(zeros, rows),
            8, columns, columns,
            filled=False,
            levels=None if float8s else 126,
            fitted=False,
        )  # fmt: skip
        if float8s:
            _check_float8(str(value.name), found)
        return found

    names = scales.name, None if zeros is None else zeros.name
    return Quantized(str(value.name), (rows, columns, by_row, *names), load)


def _spread(value: ir.Value, rows: int) -> Float64:
    """Return one number for each row, [rows, 1]: those of an initializer, or its only one."""
    shape = () if _shape(value) == () else (rows, 1)
    return np.broadcast_to(_shaped(value, shape).astype(np.float64), (rows, 1))


def _check_float8(name: str, found: Decoder) -> None:
    """Raise ParityError unless the zero is 0 and the largest numbers use the type's range."""
    largest = float(np.abs(float8.numbers(found.integers)).max())
    if found.zeros.any() or not (largest == 0 or largest >= float8.LARGEST / 2):
        raise ParityError(
            f"the weight {name} in the engine is too coarse: its numbers reach {largest:g} of "
            f"{float8.LARGEST:g}, their zero is {found.zeros.max():g}",
            expected="a scale that uses the range, and 0",
            fix="this is a bug in the pass that quantises: report it",
        )


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


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield what reads a value, by way of a Cast too: a twin of 16 bits rounds by casts."""
    for node in value.consumers():
        if node.op_identifier() == ("", "Cast", ""):
            yield from _readers(node.outputs[0])
        else:
            yield node


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
