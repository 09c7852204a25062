"""Low-rank adapters in one file: `adapter.npz` with A and B of each linear, `adapter.json`.

    adapter.json   {"scale": 2.0, "base": "my-model"}
    adapter.npz    <linear>/A [r, in], <linear>/B [out, r], in floating point

which stand for y = W x + bias + scale * B (A x).
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eptc.checkpoint import BaseModel, Contents, Format, ReadOptions
from eptc.checkpoint.contents import Source, check_fit, consume_all
from eptc.checkpoint.replaced import head_rows
from eptc.checkpoint.single_task import single_task
from eptc.errors import CheckpointError
from eptc.ir import Adapter, Branch, Constant, LowRank
from eptc.nn.adapted import ReferenceModel
from eptc.tasks import Task
from eptc.tensors import ArrayTensor

__all__ = ["Npz"]

CONFIG, TENSORS = "adapter.json", "adapter.npz"


class Npz(Format):
    """Adapters in one `.npz` file."""

    name = "npz"

    def matches(self, path: Path) -> bool:
        """Whether both files are there."""
        return (path / CONFIG).is_file() and (path / TENSORS).is_file()

    def base_name(self, path: Path) -> str | None:
        """Return what `adapter.json` calls the base."""
        name = read_config(path).get("base")
        return name if isinstance(name, str) else None

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Return a constant branch beside each linear; every tensor has to be used."""
        config, arrays = read_config(path), read_arrays(path)
        source = Source(path, {name: ArrayTensor(name, a) for name, a in arrays.items()})
        shapes = {}
        for linear in sorted({name.rpartition("/")[0] for name in arrays}):
            pair = [arrays[name] for part in "AB" if (name := f"{linear}/{part}") in arrays]
            if [array.ndim for array in pair] != [2, 2]:
                raise CheckpointError(f"{path / TENSORS} lacks A or B of {linear!r}, two matrices")
            shapes[linear] = (pair[1].shape[0], pair[0].shape[1])
        check_fit(path, base, shapes)
        adapters = {}
        for linear, (out, columns) in shapes.items():
            a = source.take(f"{linear}/A", (None, columns))
            b = source.take(f"{linear}/B", (out, a.shape[0]))
            branch = Branch(LowRank(a, b, out, columns), Constant(1.0), config["scale"])
            adapters[linear] = Adapter(linear, (branch,))
        consume_all(source)
        return Contents(
            format=self.name,
            variant="npz",
            adapters=adapters,
            heads={},
            tasks=(single_task(options, base.config, head_rows(base, {})),),
            tensors=source.finite,
            config=config,
            details={"scale": config["scale"]},
        )

    def reference(
        self,
        path: Path,
        base: Path,
        options: ReadOptions,  # noqa: ARG002  # the folder says everything
        tasks: Sequence[Task],
    ) -> ReferenceModel:
        """Return the same in PyTorch, read by code of its own."""
        from .reference import load_npz

        return load_npz(path, base, tasks[0])


def read_config(path: Path) -> dict[str, Any]:
    """Return `adapter.json`; raise CheckpointError where it is not sound."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        config["scale"] = float(config["scale"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error!r}") from error
    if not math.isfinite(config["scale"]):
        raise CheckpointError(f"{path / CONFIG} has the scale {config['scale']}")
    found: dict[str, Any] = config
    return found


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of `adapter.npz`; nothing in it is unpickled."""
    try:
        with np.load(path / TENSORS, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path / TENSORS} cannot be read: {error}") from error
