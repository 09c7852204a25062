"""A task's tensors in a pack, and the base's weights with them folded in."""

from __future__ import annotations

import mmap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from eptc.errors import BundleError
from eptc.files import sha256
from eptc.runtime.manifest import bundle_file
from eptc.runtime.ort_errors import ort_errors
from eptc.runtime.pack_spec import LABELS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.pack_manifest import PackManifest
    from eptc.runtime.pack_spec import LinearSpec, PackTask

__all__ = ["factor_names", "folded_weights", "read_tensors"]

# Bytes of float64 that are summed at once. Threads of numpy's products wait for one another at
# the end of each: where other programs run, few large ones take a tenth of the time of many.
_BLOCK: Final = 32 * 2**20


def factor_names(path: str) -> tuple[str, str]:
    """Return what the factors A [in, rank] and B [rank, out] of a linear are called."""
    return f"{path}.A", f"{path}.B"


def read_tensors(folder: Path, manifest: PackManifest, name: str) -> dict[str, NumpyArray]:
    """Return the tensors of a task by the names of the graphs' inputs, float32.

    Args:
        folder: the pack's folder.
        manifest: its manifest.
        name: the task's name there.

    Raises:
        BundleError: the file is gone or another, or holds something else than the manifest says.
    """
    import onnxruntime

    entry = manifest.tasks[name]
    path = folder / entry.file
    again = "load the pack again, and check it with `eptc verify`"
    if not path.exists():
        raise BundleError(
            f"{folder} has no {entry.file}: task {name!r} was removed since the pack was loaded, "
            "or the file is lost",
            fix=again,
        )
    path = bundle_file(folder, entry.file)
    if (found := sha256(path)) != entry.record.sha256:
        raise BundleError(
            f"{path} is not what the manifest lists for task {name!r}: its SHA-256 is "
            f"{found[:16]}...",
            expected=f"{entry.record.sha256[:16]}...",
            fix=again,
        )
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = adapter.get_parameters()
    except ort_errors() as error:
        raise BundleError(f"{path} is no adapter of ONNX Runtime: {error}", fix=again) from error
    # Copies: the values may be views of what was read, which they do not keep.
    tensors = {key: np.array(value.numpy(), order="C") for key, value in values.items()}
    del values, adapter  # in this order, and not before they are copied
    if problem := _problem(tensors, entry, manifest):
        raise BundleError(f"{path}: {problem}", fix=again)
    return tensors


def _problem(
    tensors: Mapping[str, NumpyArray], entry: PackTask, manifest: PackManifest
) -> str | None:
    """Return what about a task's tensors is not as the manifest says."""
    left, ranks = dict(tensors), Counter[int]()
    for path, spec in manifest.linears.items():
        a, b = (left.pop(name, None) for name in factor_names(path))
        if a is None and b is None:
            continue
        if a is None or b is None:
            return f"it holds one factor of {path} alone"
        rank = a.shape[-1] if a.ndim else 0
        if a.shape != (spec.in_features, rank) or b.shape != (rank, spec.out_features):
            return f"the factors of {path} have the shapes {list(a.shape)} and {list(b.shape)}"
        ranks[rank] += 1
    for name, head in manifest.heads.items():
        shape = tuple(entry.num_labels if size == LABELS else size for size in head.shape)
        found = left.pop(name, None)
        if found is None or found.shape != shape:
            was = "missing" if found is None else f"of shape {list(found.shape)}"
            return f"{name} is {was}, not {list(shape)}"
    if left:
        return f"it holds {min(left)}, which the graphs do not read"
    if {str(rank): count for rank, count in ranks.items()} != entry.ranks:
        return f"it has the ranks {dict(ranks)}, not {dict(entry.ranks)}"
    wrong = [name for name, array in tensors.items() if array.dtype != np.float32]
    return f"{min(wrong)} is not float32" if wrong else None


def folded_weights(
    folder: Path,
    manifest: PackManifest,
    tensors: Mapping[str, NumpyArray],
    graphs: Collection[str],
) -> Iterator[tuple[str, NumpyArray]]:
    """Yield each weight that a task adapts with A B in it, by its initializer's name.

    Each is laid out as it is stored, summed in float64 and rounded once, when it is asked for.

    Args:
        folder: the pack's folder.
        manifest: its manifest.
        tensors: the task's.
        graphs: roles; weights that these do not read are left out.
    """
    for path, spec in manifest.linears.items():
        a, b = (tensors.get(name) for name in factor_names(path))
        if a is not None and b is not None and not set(graphs).isdisjoint(spec.graphs):
            yield f"{path}.weight", _folded(bundle_file(folder, manifest.weights), spec, a, b)


def _folded(path: Path, spec: LinearSpec, a: NumpyArray, b: NumpyArray) -> NumpyArray:
    left, right = (a, b) if spec.transposed else (b.T, a.T)
    shape = left.shape[0], right.shape[1]
    base: Any = np.memmap(path, "<f4", "r", offset=spec.offset, shape=shape)
    # Pages of its own, which go back to the system when ONNX Runtime has copied them.
    pages = mmap.mmap(-1, shape[0] * shape[1] * np.dtype(np.float32).itemsize)
    total = np.frombuffer(pages, np.float32).reshape(shape)
    columns, step = right.astype(np.float64), max(1, _BLOCK // (8 * shape[1]))
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        total[rows] = base[rows] + left[rows].astype(np.float64) @ columns
    return total
