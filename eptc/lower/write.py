"""Write graphs that share one weights file, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.lower.weights import WeightTensor

__all__ = ["WEIGHTS", "write"]

WEIGHTS = "weights.bin"

# Up to this many bytes a tensor stays in the graph: shape arithmetic must be readable there.
_INLINE = 1024
_LARGE = 64 * 1024
# Large tensors start on a page, so that a runtime can map them.
_PAGE = 4096
_LINE = 64
# A transposed tensor is made contiguous piece by piece.
_PIECE = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the weights file."""

    tensor: ir.TensorProtocol
    offset: int
    length: int


def write(graphs: Mapping[str, ir.Model], directory: Path) -> list[Path]:
    """Write `weights.bin` and `<key>.onnx` of each graph; the same input gives the same bytes.

    Each distinct tensor is written once, whichever graphs read it. The graphs are left as
    they were. A file that is in the way is overwritten.

    Args:
        graphs: bound graphs by name.
        directory: an existing folder.

    Returns:
        The files, weights first.

    Raises:
        InternalError: a graph has a weight that was never bound.
    """
    slots = _plan(graphs)
    with (directory / WEIGHTS).open("wb") as file:
        for slot in slots.values():
            file.write(bytes(slot.offset - file.tell()))
            _stream(slot, file)
    paths = [directory / WEIGHTS]
    for name, model in graphs.items():
        path = directory / f"{name}.onnx"
        path.write_bytes(_serialize(model, slots))
        paths.append(path)
    return paths


def _plan(graphs: Mapping[str, ir.Model]) -> dict[Hashable, _Slot]:
    """Give every distinct tensor its place, in the order the graphs name them."""
    slots: dict[Hashable, _Slot] = {}
    end = 0
    for name, model in graphs.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise InternalError(f"the graph {name!r} has no data for {value.name}")
            key = _key(tensor)
            if key is None or key in slots:
                continue
            alignment = _PAGE if tensor.nbytes >= _LARGE else _LINE
            offset = -(-end // alignment) * alignment
            slots[key] = _Slot(tensor, offset, tensor.nbytes)
            end = offset + tensor.nbytes
    return slots


def _key(tensor: ir.TensorProtocol) -> Hashable | None:
    """Return what the tensor's numbers are known by; None where it stays in the graph."""
    if tensor.nbytes <= _INLINE:
        return None
    if isinstance(tensor, WeightTensor):
        return tensor.key
    content = hashlib.sha256(tensor.tobytes()).hexdigest()
    return (content, tensor.dtype, tensor.shape.numpy())


def _stream(slot: _Slot, file: BinaryIO) -> None:
    """Write one tensor's bytes, little endian, row by row."""
    start = file.tell()
    if slot.tensor.dtype.bitwidth < 8:
        file.write(slot.tensor.tobytes())  # Two or more numbers to a byte.
    else:
        array = slot.tensor.numpy()
        array = array.reshape(1) if array.ndim == 0 else array
        rows = max(1, _PIECE // max(1, array.nbytes // max(1, len(array))))
        for row in range(0, len(array), rows):
            piece = np.ascontiguousarray(array[row : row + rows])
            file.write(piece.reshape(-1).view(np.uint8).data)
    if file.tell() - start != slot.length:
        raise InternalError(
            f"{slot.tensor.name}: {file.tell() - start} bytes written, {slot.length} declared"
        )


def _serialize(model: ir.Model, slots: Mapping[Hashable, _Slot]) -> bytes:
    """Return the graph's bytes with references into the weights file."""
    inside = {}
    try:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            key = _key(tensor)
            if key is None:
                continue
            inside[value] = tensor
            slot = slots[key]
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                slot.offset,
                slot.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )
        proto = ir.to_proto(model)
    finally:
        for value, tensor in inside.items():
            value.const_value = tensor
    # Sizes of values in between: a pass may have made them stale, and runtimes infer them.
    del proto.graph.value_info[:]
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
