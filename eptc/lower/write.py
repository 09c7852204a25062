"""Write graphs that share one weights file, a few tensors in memory at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from eptc.errors import InternalError
from eptc.lower.weights import WeightTensor, to_proto
from eptc.tensors import Array

__all__ = ["IN_FLIGHT", "WEIGHTS", "WeightsFile", "write"]

WEIGHTS = "weights.bin"

# Up to this many bytes a tensor stays in the graph: shape arithmetic must be readable there.
_INLINE = 1024
_LARGE = 64 * 1024
# Large tensors start on a page, so that a runtime can map them.
_PAGE = 4096
_LINE = 64
# Bytes that are written and hashed at once: hashed while they are still in the cache.
_PIECE = 2**20
_TILE = 64
# Bytes of tensors that were computed and wait to be written.
IN_FLIGHT = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the weights file."""

    tensor: ir.TensorProtocol
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """A written `weights.bin`: any graph of tensors that are in it can be written beside it.

    Args:
        sha256: hex digest of its content.
        slots: where each tensor lies.
        outside: names of initializers that are in it however small they are.
    """

    sha256: str
    slots: Mapping[Hashable, _Slot]
    outside: frozenset[str] = frozenset()

    @classmethod
    def write(
        cls,
        graphs: Mapping[str, ir.Model],
        directory: Path,
        *,
        threads: int = 1,
        in_flight: int = IN_FLIGHT,
        progress: Callable[[int, int], None] = lambda _, __: None,
        outside: frozenset[str] = frozenset(),
    ) -> WeightsFile:
        """Write every distinct tensor of some graphs once; arguments as for `write`.

        Initializers that are named in `outside` get a place however small they are.
        """
        slots = _plan(graphs, outside)
        total = sum(slot.length for slot in slots.values())
        written, digest = 0, hashlib.sha256()
        with (directory / WEIGHTS).open("wb") as file:
            for slot, array in _computed(list(slots.values()), threads, in_flight):
                for piece in _pieces(slot, array, file.tell()):
                    file.write(piece)
                    digest.update(piece)
                del array, piece  # before the next one is asked for
                written += slot.length
                progress(written, total)
        return cls(digest.hexdigest(), slots, outside)

    def write_graph(self, model: ir.Model, path: Path) -> str:
        """Write a graph whose weights are in this file; return its SHA-256 (hex)."""
        content = _serialize(model, self.slots, self.outside)
        path.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def offset(self, value: ir.Value) -> int:
        """Return where the numbers of an initializer begin, in bytes."""
        tensor = value.const_value
        assert tensor is not None
        return self.slots[_key(value, tensor, self.outside)].offset


def write(
    graphs: Mapping[str, ir.Model],
    directory: Path,
    *,
    threads: int = 1,
    in_flight: int = IN_FLIGHT,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> dict[str, str]:
    """Write `weights.bin` and `<key>.onnx` of each graph; the same input gives the same bytes.

    Each distinct tensor is written once, whichever graphs read it. Threads compute tensors
    while others are written. The graphs are left as they were. A file that is in the way is
    overwritten.

    Args:
        graphs: bound graphs by name.
        directory: an existing folder.
        threads: how many tensors are computed at once.
        in_flight: bytes of tensors that may be in memory; a larger one is there alone.
        progress: called with the bytes of weights written so far, and of all.

    Returns:
        The SHA-256 (hex) of each file by name, weights first.

    Raises:
        InternalError: a graph has a weight that was never bound.
    """
    weights = WeightsFile.write(
        graphs, directory, threads=threads, in_flight=in_flight, progress=progress
    )
    digests = {WEIGHTS: weights.sha256}
    for name, model in graphs.items():
        digests[f"{name}.onnx"] = weights.write_graph(model, directory / f"{name}.onnx")
    return digests


def _computed(
    slots: Sequence[_Slot], threads: int, in_flight: int
) -> Iterator[tuple[_Slot, Array]]:
    """Yield each slot with its numbers, in order; the next ones are computed meanwhile."""
    waiting: collections.deque[tuple[_Slot, concurrent.futures.Future[Array]]]
    waiting = collections.deque()
    ahead = 0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for slot in slots:
                while waiting and (len(waiting) > threads or ahead + slot.length > in_flight):
                    ahead -= waiting[0][0].length
                    yield _result(waiting)
                waiting.append((slot, pool.submit(_numbers, slot.tensor)))
                ahead += slot.length
            while waiting:
                yield _result(waiting)
        finally:
            # After an error nobody waits for what was not begun.
            pool.shutdown(cancel_futures=True)


def _result(
    waiting: collections.deque[tuple[_Slot, concurrent.futures.Future[Array]]],
) -> tuple[_Slot, Array]:
    """Take the first tensor out of the queue; nothing else holds it afterwards."""
    slot, future = waiting.popleft()
    return slot, future.result()


def _numbers(tensor: ir.TensorProtocol) -> Array:
    """Return a tensor's numbers in the order in which they are written."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)  # Two or more numbers to a byte.
    array = tensor.numpy()
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    # A transposed matrix is copied in tiles that fit the cache: three times as fast.
    copied = np.empty(array.shape, array.dtype)
    for row in range(0, array.shape[0], _TILE):
        for column in range(0, array.shape[1], _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            copied[tile] = array[tile]
    return copied


def _pieces(slot: _Slot, array: Array, position: int) -> Iterator[bytes | memoryview]:
    """Yield what fills the file up to a tensor's place, then its bytes, little endian."""
    content = array.reshape(-1).view(np.uint8)
    if content.nbytes != slot.length:
        raise InternalError(
            f"{slot.tensor.name}: {content.nbytes} bytes computed, {slot.length} declared"
        )
    yield bytes(slot.offset - position)
    for start in range(0, slot.length, _PIECE):
        yield content[start : start + _PIECE].data


def _plan(graphs: Mapping[str, ir.Model], outside: frozenset[str]) -> dict[Hashable, _Slot]:
    """Give every distinct tensor its place, in the order the graphs name them."""
    slots: dict[Hashable, _Slot] = {}
    end = 0
    for name, model in graphs.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise InternalError(f"the graph {name!r} has no data for {value.name}")
            key = _key(value, tensor, outside)
            if key is None or key in slots:
                continue
            alignment = _PAGE if tensor.nbytes >= _LARGE else _LINE
            offset = -(-end // alignment) * alignment
            slots[key] = _Slot(tensor, offset, tensor.nbytes)
            end = offset + tensor.nbytes
    return slots


def _key(value: ir.Value, tensor: ir.TensorProtocol, outside: frozenset[str]) -> Hashable | None:
    """Return what an initializer's numbers are known by; None where they stay in the graph."""
    if tensor.nbytes <= _INLINE and value.name not in outside:
        return None
    if isinstance(tensor, WeightTensor):
        return tensor.key
    content = hashlib.sha256(tensor.tobytes()).hexdigest()
    return (content, tensor.dtype, tensor.shape.numpy())


def _serialize(model: ir.Model, slots: Mapping[Hashable, _Slot], outside: frozenset[str]) -> bytes:
    """Return the graph's bytes with references into the weights file."""
    inside = {}
    try:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            key = _key(value, tensor, outside)
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
        proto = to_proto(model)
    finally:
        for value, tensor in inside.items():
            value.const_value = tensor
    # Sizes of values in between: a pass may have made them stale, and runtimes infer them.
    del proto.graph.value_info[:]
    content: bytes = proto.SerializeToString(deterministic=True)
    return content
