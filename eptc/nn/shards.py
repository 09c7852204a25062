"""A base's stored tensors, read one at a time: no file is mapped or held as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import Tensor

from eptc.errors import BaseModelError

__all__ = ["Shards", "StoredTensor"]

_FLOATS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Args:
        path: its file.
        dtype: its type as the file spells it.
        shape: its shape.
        offset: of its first byte in the file.
        length: in bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Shards:
    """The safetensors weights of a folder, sharded or not.

    Args:
        directory: a Hugging Face model folder.

    Raises:
        BaseModelError: the folder has no readable safetensors weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.tensors = {
                name: tensor for path in _files(directory) for name, tensor in _header(path)
            }
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise BaseModelError(f"the weights in {directory} cannot be read: {error}") from error

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor.

        Raises:
            BaseModelError: it is no float type.
        """
        found = self.tensors[name]
        if found.dtype not in _FLOATS:
            raise BaseModelError(
                f"{name} in {found.path} has the type {found.dtype}", expected=", ".join(_FLOATS)
            )
        return _FLOATS[found.dtype]

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes.

        Raises:
            BaseModelError: the file cannot be read.
        """
        path, _, _, offset, length = self.tensors[name]
        try:
            data = np.fromfile(path, np.uint8, length, offset=offset)
        except OSError as error:
            raise BaseModelError(f"{path} cannot be read: {error}") from error
        if len(data) != length:
            raise BaseModelError(f"{path} ends inside {name}", fix="copy or download it again")
        return data

    def read(self, name: str) -> Tensor:
        """Return a tensor as float32.

        Raises:
            BaseModelError: the file cannot be read, or the tensor is of no float type.
        """
        dtype = self.dtype(name)
        bits = torch.from_numpy(self.stored(name))
        return bits.view(dtype).reshape(self.tensors[name].shape).to(torch.float32)


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(names))]


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    # Opened by the library first: it refuses a file whose header does not fit its size.
    with safetensors.safe_open(path, framework="pt"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield (
                name,
                StoredTensor(
                    path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin
                ),
            )
