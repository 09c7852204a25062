"""The weight gate of a Hugging Face folder: every tensor against the reference's own parameter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from eptc.errors import ParityError
from eptc.nn.adapted import AdaptedLinear
from eptc.parity_gate.weights import ELEMENTS, off_by

__all__ = ["FolderWeights", "check_folder_weights", "tensor_files"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Elements read at once: what is mapped of a file counts as memory until it is closed.
_READ = 2**22
_BUG = "this is a bug in eptc: report it"


@dataclasses.dataclass(frozen=True)
class FolderWeights:
    """What was found.

    Args:
        tensors: how many were compared, each with every element.
        adapted: how many of them hold experts.
        deviation: the largest of an adapted one, as a fraction of its bound.
    """

    tensors: int
    adapted: int
    deviation: float


def check_folder_weights(
    directory: Path,
    parameters: Mapping[str, Float32],
    places: Mapping[str, Hashable],
    layers: Mapping[str, AdaptedLinear],
    task_id: int,
    dtypes: Mapping[str, str],
) -> FolderWeights:
    """Compare every tensor of a folder with the reference's parameter of that name.

    The names are those of the plain task model, one tensor for each parameter and one for all
    that are tied. A tensor without experts is the base's to the bit; one with experts may be off
    by one rounding to its type and by 1e-5 of the largest element that the experts add. Each
    lies the way round the model has it.

    Args:
        directory: the folder.
        parameters: the reference's, by the names the plain task model has; may be read when
            they are asked for.
        places: by the same names; equal for parameters that are tied.
        layers: the adapted linears, by their full names.
        task_id: the task, by the reference's own list.
        dtypes: the type that each tensor is to be stored in.

    Raises:
        ParityError: a tensor is missing, there twice, off, or has no place in the model.
    """
    files = tensor_files(directory)
    _check_names(files, places)
    adapted = {f"{path}.weight": layer for path, layer in layers.items()}
    if lost := sorted(set(adapted) - set(files)):
        raise ParityError(f"the folder has no {lost[0]}, which the checkpoint adapts", fix=_BUG)
    worst = 0.0
    for name, path in files.items():
        # The base's weight afterwards: while a matrix of experts is made there are two of them.
        delta = adapted[name].dense(task_id).numpy() if name in adapted else None
        base = parameters[name]
        worst = max(worst, _check_one(name, path, base, delta, dtypes[name]))
        del base, delta  # before the next ones are there
    return FolderWeights(len(files), len(adapted), worst)


def tensor_files(directory: Path) -> dict[str, Path]:
    """Return each tensor's file, by its name.

    Raises:
        ParityError: the index does not say what is in the files.
    """
    index = directory / _INDEX
    if not index.is_file():
        found = dict.fromkeys(_names(directory / _SINGLE), directory / _SINGLE)
    else:
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = [directory / file for file in sorted(set(listed.values()))]
        found = {name: path for path in shards for name in _names(path)}
        if {name: path.name for name, path in found.items()} != listed:
            raise ParityError(f"{_INDEX} does not list what the shards hold", fix=_BUG)
    return dict(sorted(found.items()))


def _names(path: Path) -> list[str]:
    with safetensors.safe_open(path, framework="np") as file:
        return list(file.keys())


def _check_names(files: Mapping[str, Path], places: Mapping[str, Hashable]) -> None:
    if odd := [name for name in files if name not in places]:
        raise ParityError(f"the folder has {odd[0]}, for which the model has no place", fix=_BUG)
    written: dict[Hashable, str] = {}
    for name in files:
        if (twin := written.setdefault(places[name], name)) != name:
            raise ParityError(f"the folder has {name} and {twin}, which are tied", fix=_BUG)
    if lost := sorted(name for name, place in places.items() if place not in written):
        raise ParityError(f"the folder has no {lost[0]}", fix=_BUG)


def _check_one(name: str, path: Path, base: Float32, delta: Float32 | None, dtype: str) -> float:
    """Return the largest deviation of a tensor, as a fraction of its bound."""
    largest = 0.0 if delta is None else float(max(delta.max(), -delta.min()))
    worst = 0.0
    for start, found in _rows(name, path, base.shape, dtype):
        rows = slice(start, start + len(found))
        if delta is None:
            if not np.array_equal(found.astype(np.float32), base[rows]):
                _refuse(name, start, found, base[rows], "the base has")
            continue
        want, ratio = off_by(found, base[rows], delta[rows], found.dtype, largest)
        if not (error := float(ratio.max())) <= 1.0:  # NaN is not either
            _refuse(name, start, found, want, "base and experts give", ratio)
        worst = max(worst, error)
    return worst


def _rows(
    name: str, path: Path, shape: tuple[int, ...], dtype: str
) -> Iterator[tuple[int, Array]]:
    """Yield the number of the first of some rows, and these, of a tensor from its beginning."""
    width = max(1, int(np.prod(shape[1:])))
    many, few = max(1, _READ // width), max(1, ELEMENTS // width)
    for start in range(0, shape[0], many):
        with safetensors.safe_open(path, framework="np") as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ParityError(
                    f"{name} in {path.name} has the shape {stored.get_shape()}",
                    expected=str(list(shape)), fix=_BUG,
                )  # fmt: skip
            read: Array = stored[start : min(start + many, shape[0])]
        if read.dtype.name != dtype:
            raise ParityError(
                f"{name} in {path.name} has the type {read.dtype.name}", expected=dtype, fix=_BUG
            )
        for row in range(0, len(read), few):
            yield start + row, read[row : row + few]


def _refuse(
    name: str, start: int, found: Array, want: Array, whose: str, ratio: Array | None = None
) -> None:
    off = np.abs(found.astype(np.float64) - want) if ratio is None else ratio
    at = np.unravel_index(int(np.argmax(np.nan_to_num(off, nan=np.inf))), off.shape)
    place = [start + int(at[0]), *(int(i) for i in at[1:])]
    raise ParityError(
        f"{name} in the folder is off at {place}: {float(found[at]):.7g}, {whose} "
        f"{float(want[at]):.7g}" + ("" if ratio is None else f", {off[at]:.3g} times the bound"),
        fix="check --base; if it is right, this is a bug in the fold: report it",
    )
