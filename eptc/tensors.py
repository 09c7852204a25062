"""Lazy tensors: a name, a type and a shape now, the numbers only when they are asked for."""

from __future__ import annotations

import abc
import dataclasses
import errno
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from eptc.errors import CheckpointError, InputError

__all__ = [
    "Array",
    "ArrayTensor",
    "ComputedTensor",
    "LazyTensor",
    "SafetensorsFile",
    "StoredTensor",
    "as_dtype",
    "cast",
    "content_hash",
    "limit",
    "numpy_dtype",
    "round_to_odd",
    "round_up",
    "smallest",
    "unit_roundoff",
]

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

# safetensors spelling -> (numpy dtype)
_STORED: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_SPELLING = {dtype.name: stored for stored, dtype in _STORED.items()}
_MAX_HEADER = 100 * 2**20
# Elements. Below this numpy's own conversion to float16 is fast enough.
_SMALL = 4096
# Above the smallest normal float16, 2**-14, by more than a float32 can be off.
_NORMAL_FLOAT16 = 2.0**-14 * (1 + 2.0**-10)


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """Return the numpy dtype of a name such as `float32` or `bfloat16`."""
    return _STORED[_SPELLING[name]]


def unit_roundoff(dtype: str) -> float:
    """Return the largest relative error of one rounding to a floating-point type."""
    info: Any = ml_dtypes.finfo
    return float(info(numpy_dtype(dtype)).eps) / 2


def limit(dtype: str) -> float:
    """Return the largest finite number of a floating-point type."""
    info: Any = ml_dtypes.finfo
    return float(info(numpy_dtype(dtype)).max)


def smallest(dtype: str) -> float:
    """Return the smallest number above 0 that has all digits of a floating-point type."""
    info: Any = ml_dtypes.finfo
    return float(info(numpy_dtype(dtype)).smallest_normal)


def cast(array: Array, dtype: str) -> Array:
    """Round `array` once to `dtype`: the one casting path for every weight eptc writes.

    numpy rounds float64 to float32 and float16 once. To bfloat16 ml_dtypes goes through float32,
    two roundings; rounding to odd in the first makes the second equal to one rounding.
    """
    target = numpy_dtype(dtype)
    if array.dtype == target:
        return array
    if target == numpy_dtype("bfloat16") and array.dtype == np.float64:
        return round_to_odd(array).astype(target)
    if target == np.float16 and array.size > _SMALL:
        return _to_float16(array)
    if array.dtype == np.float16 and target == np.float32 and array.size > _SMALL:
        return _from_float16(array)
    return array.astype(target)


def _to_float16(array: Array) -> Array:
    """Round to float16 once, as numpy does element by element, ten times as fast.

    By way of float32: a second rounding differs from a single one only where the float32 lies
    half way between two float16. Those, and numbers near and below the smallest normal ones,
    where half way is elsewhere, are left to numpy.
    """
    import torch

    with np.errstate(over="ignore", invalid="ignore"):
        near = np.array(array, np.float32, order="C")
        rounded = np.asarray(torch.from_numpy(near).to(torch.float16).numpy())
        delicate = (near.view(np.uint32) & 0x1FFF) == 0x1000
        delicate |= np.abs(near) < _NORMAL_FLOAT16
        rounded[delicate] = array[delicate].astype(np.float16)
    return rounded


def _from_float16(array: Array) -> Array:
    """Widen float16 to float32, as numpy does, several times as fast."""
    import torch

    # A copy: torch has no tensors that may not be written to.
    widened: Array = torch.from_numpy(np.array(array, order="C")).to(torch.float32).numpy()
    return widened


def round_up(array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """Return numbers above 0, each with no more digits than a type has, and never smaller.

    Whether its exponent fits is not looked at: the type of the array stays.

    Args:
        array: float32, any shape.
        dtype: floating-point type whose digits are kept.
    """
    fraction, exponent = np.frexp(array)
    digits = 1 / unit_roundoff(dtype)
    return np.asarray(np.ldexp(np.ceil(fraction * digits) / digits, exponent), np.float32)


def round_to_odd(array: Array) -> Array:
    """Round float64 to float32 so that no later rounding to fewer bits rounds twice."""
    exact = array.astype(np.float64)
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = (near.astype(np.float64) != exact) & np.isfinite(near)
    # Towards zero first, then the last bit set: the mark that something was cut off.
    away = inexact & (np.abs(near.astype(np.float64)) > np.abs(exact))
    odd = np.where(away, bits - np.uint32(1), bits)
    odd = np.where(inexact, odd | np.uint32(1), odd)
    return odd.astype(np.uint32).view(np.float32)


class LazyTensor(abc.ABC):
    """A named tensor whose numbers are read or computed on demand and never kept."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the numbers in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    @abc.abstractmethod
    def numpy(self) -> Array:
        """Return the numbers, shape `shape`, type `dtype`; the caller must not write to them."""


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayTensor(LazyTensor):
    """A tensor whose numbers are already at hand: a head, a constant."""

    name: str
    array: Array

    @property
    def dtype(self) -> str:  # type: ignore[override]  # a read-only view of the array's own
        """Name of the array's type."""
        return self.array.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]  # as above
        """Shape of the array."""
        return self.array.shape

    def numpy(self) -> Array:
        """Return the array itself."""
        return self.array


@dataclasses.dataclass(frozen=True, eq=False)
class ComputedTensor(LazyTensor):
    """A tensor that a function makes each time it is asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[], Array] = dataclasses.field(repr=False)

    def numpy(self) -> Array:
        """Compute the numbers and check that they are what was declared."""
        array = self.compute()
        if array.shape != self.shape or array.dtype != numpy_dtype(self.dtype):
            raise AssertionError(
                f"{self.name}: computed {array.dtype}{array.shape}, "
                f"declared {self.dtype}{self.shape}"
            )
        return array


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor(LazyTensor):
    """A tensor in a safetensors file; `offset` is absolute, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    def numpy(self) -> Array:
        """Map the tensor's own pages and copy them out.

        Only this tensor's pages are mapped, never the file: address space stays bounded by the
        largest tensor. The copy outlives the map, so a file that is truncated later cannot
        kill the process with a bus error in the middle of a build.
        """
        if self.nbytes == 0:
            return np.empty(self.shape, numpy_dtype(self.dtype))
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.offset + self.nbytes:
                    raise CheckpointError(
                        f"{self.path} became shorter while it was read",
                        fix="leave the checkpoint alone while it is compiled",
                    )
                length = self.offset - start + self.nbytes
                with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as m:
                    data = m[self.offset - start : length]
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(f"{self.name} has {self.nbytes:,} bytes") from error
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return np.frombuffer(data, numpy_dtype(self.dtype)).reshape(self.shape)


class SafetensorsFile(Mapping[str, StoredTensor]):
    """The tensors of one safetensors file, by name; only the header is read.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors = self._read_header()

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a sound safetensors file: {what}",
            fix="copy or download the file again",
        )

    def _read_header(self) -> dict[str, StoredTensor]:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER):
                    raise self._bad(f"{size} bytes, header of {length} bytes: truncated")
                header = json.loads(file.read(length).decode())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror or error}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not an object")
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict):
            self.metadata = {str(key): str(value) for key, value in metadata.items()}
        start = 8 + length
        tensors = {name: self._tensor(name, entry, start) for name, entry in header.items()}
        self._check_layout(tensors, start, size)
        return tensors

    def _tensor(self, name: str, entry: object, start: int) -> StoredTensor:
        try:
            assert isinstance(entry, dict)
            stored, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise self._bad(f"the entry of {name!r} is malformed") from error
        if not isinstance(stored, str) or stored not in _STORED:
            raise CheckpointError(
                f"{name} in {self.path} has the type {stored}",
                expected=", ".join(_STORED),
            )
        if min((*shape, 0)) < 0:
            raise self._bad(f"{name!r} has the shape {list(shape)}")
        dtype = _STORED[stored]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise self._bad(f"{name!r} has {end - begin} bytes for {stored}{list(shape)}")
        return StoredTensor(name, dtype.name, shape, self.path, start + begin)

    def _check_layout(self, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
        """Tensors follow one another without holes and end where the file ends."""
        position = start
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset != position:
                raise self._bad(f"{tensor.name!r} overlaps another tensor or leaves a hole")
            position += tensor.nbytes
        if position != size:
            raise self._bad(f"it has {size} bytes, its header describes {position}: truncated?")


def as_dtype(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """Return the tensor rounded to another type when it is read; itself where it has that type."""
    if tensor.dtype == dtype:
        return tensor
    return ComputedTensor(tensor.name, dtype, tensor.shape, lambda: cast(tensor.numpy(), dtype))


def content_hash(tensors: Iterable[LazyTensor]) -> str:
    """Return the SHA-256 over name, type, shape and bytes of each tensor, sorted by name.

    The same for any sharding and any order on disk. One tensor is in memory at a time.
    """
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda t: t.name):
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{tensor.name}\n{_SPELLING[tensor.dtype]}\n{shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
