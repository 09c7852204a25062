"""Write weights as safetensors files of bounded size, one file in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from eptc.bundle import share, write_json, written_by
from eptc.files import sha256
from eptc.tensors import Array, LazyTensor, as_dtype

__all__ = ["SHARD", "Shard", "plan_shards", "shards_peak", "write_shards"]

# Bytes of a file; a larger tensor has one of its own. As transformers counts: decimal.
SHARD = 512 * 10**6
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file.

    Args:
        file: its name.
        tensors: what it holds, by the names the task model has.
    """

    file: str
    tensors: Mapping[str, LazyTensor]

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_shards(weights: Mapping[str, LazyTensor], dtype: str | None, size: int) -> list[Shard]:
    """Return the files of a model, in the order of the weights' names; nothing is read.

    Where what lies depends on names and sizes alone: not on the base's files, nor on the machine.

    Args:
        weights: every parameter of the task model by its name there, tied ones once.
        dtype: type to store them in; None: each in its own.
        size: bytes of a file.
    """
    groups: list[dict[str, LazyTensor]] = []
    room = 0
    for name in sorted(weights):
        tensor = weights[name] if dtype is None else as_dtype(weights[name], dtype)
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = size
        groups[-1][name] = tensor
        room -= tensor.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    return [Shard(name, group) for name, group in zip(names, groups, strict=True)]


def shards_peak(shards: Sequence[Shard], weights: Mapping[str, LazyTensor]) -> int:
    """Return how many bytes of weights are in memory at once while files are written, at most.

    A file's tensors, and beside them the last of them as it was read and as it is widened.
    """
    return max(
        shard.nbytes + max(3 * weights[name].nbytes for name in shard.tensors) for shard in shards
    )


def write_shards(
    shards: Sequence[Shard],
    directory: Path,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> dict[str, str]:
    """Write every file, and the index where there are several; return their SHA-256 by name.

    Args:
        shards: what is written; each tensor is computed when its file is.
        directory: an existing folder.
        progress: called with the bytes of weights written so far, and of all.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    total, done, digests = sum(shard.nbytes for shard in shards), 0, {}
    for shard in shards:
        arrays: dict[str, Array] = {}
        for name, tensor in shard.tensors.items():
            arrays[name] = np.ascontiguousarray(tensor.numpy())
        path = directory / shard.file
        with written_by("safetensors", path, SafetensorError):
            save_file(arrays, path, metadata={"format": "pt"})  # what transformers asks for
        share(path)
        del arrays
        done += shard.nbytes
        progress(done, total)
        digests[shard.file] = sha256(path)
    if len(shards) > 1:
        places = {name: shard.file for shard in shards for name in sorted(shard.tensors)}
        write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return digests
