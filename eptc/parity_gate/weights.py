"""The weight gate: what was written to disk against the reference's own parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir

from eptc.errors import ParityError
from eptc.lower.weights import PACKED, PART, STACKED
from eptc.nn.adapted import AdaptedLinear, ReferenceModel
from eptc.parity_gate.nearest import check_nearest
from eptc.parity_gate.stored import Decoder, quantized, read

__all__ = [
    "ELEMENTS",
    "check_arrays",
    "check_close",
    "check_equal",
    "check_stored",
    "check_weights",
    "off_by",
    "plain_parameters",
]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
# Compared at once, in float64: there is no room for copies of a large matrix, and some in
# float64 should fit the processor's cache.
ELEMENTS = 2**15


def check_weights(
    directory: Path, files: list[str], reference: ReferenceModel, task_id: int
) -> float:
    """Compare every weight in the engine's files with the reference's parameter of that name.

    A weight without adapters must be equal to the bit, rounded once where it is stored in 16
    bits. An adapted one may differ by one rounding to its stored type and by 1e-5 of the largest
    element of its branches. Weights may be stored transposed: whether they are used that way
    round is seen in the outputs. A packed weight, its name the names of its parts with `+` between
    them, holds them side by side [in, sum of out]: each part is compared as if it stood alone.

    Beside a routed linear, whose branches are no weight, the base's is there to the bit.

    A weight that is stored as integers must be the nearest to the sum of base and experts that
    they can be (`nearest.py`).

    Returns:
        The largest deviation of a weight that may deviate, as a fraction of its bound.

    Raises:
        ParityError: a weight is off, or an adapted one is in no file.
    """
    parameters = plain_parameters(reference, task_id)
    return check_stored(directory, files, parameters, reference.layers, task_id)


def plain_parameters(reference: ReferenceModel, task_id: int) -> dict[str, Float32]:
    """Return the reference's parameters by the names the plain model of a task has."""
    return {
        plain: parameter.detach().numpy()
        for name, parameter in reference.hf.named_parameters(remove_duplicate=False)
        if (plain := reference.plain_name(name, task_id))
    }


def check_stored(
    directory: Path,
    files: list[str],
    parameters: Mapping[str, Float32],
    layers: Mapping[str, AdaptedLinear],
    task_id: int,
) -> float:
    """Compare as `check_weights` does, with parameters that may be read when they are asked for.

    Args:
        directory: the bundle's folder.
        files: its graphs.
        parameters: the reference's, by the names the plain task model has.
        layers: the adapted linears, by their full names; their base need not be in memory.
        task_id: the task, by the reference's own list.
    """
    stored = _unpacked(_stored(directory, files), parameters, layers)
    return check_arrays(stored, parameters, layers, task_id)


def check_arrays(
    stored: Iterable[tuple[str, Array | Decoder]],
    parameters: Mapping[str, Float32],
    layers: Mapping[str, AdaptedLinear],
    task_id: int,
) -> float:
    """Compare as `check_stored` does.

    Args:
        stored: what an engine has, by name, each when it is asked for.
        parameters: the reference's.
        layers: the linears whose branches are in their weight.
        task_id: the task, by the reference's own list.
    """
    adapted = {f"{path}.weight": layer for path, layer in layers.items() if layer.folds}
    seen, worst = set(), 0.0
    for name, array in stored:
        if name in parameters:
            seen.add(name)
            worst = max(worst, _check_one(name, array, parameters, adapted, task_id))
    if missing := sorted(set(adapted) - seen):
        raise ParityError(
            f"the engine has no weight {missing[0]}, which the checkpoint adapts",
            fix="this is a bug in the lowering: report it",
        )
    return worst


def _check_one(
    name: str,
    found: Array | Decoder,
    parameters: Mapping[str, Float32],
    adapted: Mapping[str, AdaptedLinear],
    task_id: int,
) -> float:
    """Return a weight's largest deviation as a fraction of its bound; 0 if it has none."""
    base = parameters[name]
    # From the experts' definitions; the layer gate compares the module's own forward.
    delta = adapted[name].dense(task_id).numpy() if name in adapted else None
    if isinstance(found, Decoder):
        return check_nearest(name, found, base, delta)
    if delta is not None:
        return check_close(name, found, base, delta)
    check_equal(name, found, base)
    return 0.0


def _stored(directory: Path, files: list[str]) -> Iterator[tuple[str, Array | Decoder]]:
    """Yield each initializer once, read from disk one at a time; integers as what they stand for.

    Integers that graphs read in two ways are there twice.
    """
    seen: set[object] = set()
    for file in files:
        graph = onnx_ir.load(directory / file).graph
        weights = list(quantized(graph))
        integers = {weight.name for weight in weights}
        for weight in weights:
            if weight not in seen:
                seen.add(weight)
                yield weight.name, weight.open()
        for name, value in graph.initializers.items():
            if name not in seen and name not in integers and value.const_value is not None:
                seen.add(name)
                yield name, read(value.const_value)


def _unpacked(
    stored: Iterable[tuple[str, Array | Decoder]],
    parameters: Mapping[str, Float32],
    layers: Collection[str],
) -> Iterator[tuple[str, Array | Decoder]]:
    """Yield the parts of packed weights by their own names, other weights as they are.

    Bases of routed branches, all of one rank, may be packed with them: they are no parameters.
    """
    for name, found in stored:
        parts = name.split(PACKED)
        if len(parts) == 1 or PART in name or STACKED in name:
            yield name, found
            continue
        bases = [part for part in parts if part not in parameters]
        if lost := [part for part in bases if part.rpartition(".branch.")[0] not in layers]:
            raise ParityError(
                f"the engine packs {lost[0]} into {name}, and the reference has no such weight",
                fix="this is a bug in the pass that packs: report it",
            )
        shape = (found.columns, len(found)) if isinstance(found, Decoder) else found.shape
        known = sum(parameters[part].shape[0] for part in parts if part in parameters)
        rank = (shape[-1] - known) // len(bases) if bases else 0
        widths = [parameters[p].shape[0] if p in parameters else rank for p in parts]
        if len(shape) != 2 or shape[1] != sum(widths) or (bases and rank < 1):
            raise ParityError(
                f"the weight {name} in the engine has the shape {list(shape)}",
                expected=f"{sum(widths)} columns: {' + '.join(map(str, widths))}",
                fix="this is a bug in the pass that packs: report it",
            )
        start = 0
        for part, width in zip(parts, widths, strict=True):
            if isinstance(found, Decoder):
                yield part, found.part(start, width)
            else:
                yield part, found[:, start : start + width]
            start += width


def _oriented(array: Array, want: Array) -> Array:
    """Return the array the way round that is nearer to what is expected."""
    if array.ndim != 2 or array.shape == want.shape != want.shape[::-1]:
        return array
    if array.shape == want.shape and np.abs(array - want).sum() <= np.abs(array.T - want).sum():
        return array
    return array.T


def check_equal(name: str, array: Array, base: Float32) -> None:
    """Raise ParityError unless a stored weight is the reference's, rounded once to its type."""
    narrow = array.dtype == np.float16 or array.dtype == ml_dtypes.bfloat16
    want: Array = base.astype(array.dtype) if narrow else base
    found = _oriented(array, want)
    if found.shape != want.shape or not np.array_equal(found, want):
        detail = f"shape {list(found.shape)}, expected {list(want.shape)}"
        if found.shape == want.shape:
            off = np.abs(found.astype(np.float32) - want.astype(np.float32))
            at = np.unravel_index(int(np.argmax(off)), want.shape)
            detail = f"element {[int(i) for i in at]} is {found[at]}, the reference has {want[at]}"
        raise ParityError(
            f"the weight {name} in the engine is not the base's: {detail}",
            expected="the base's weight to the bit, rounded once to the stored type",
            fix="check --base; if it is right, this is a bug in the lowering: report it",
        )


def check_close(name: str, array: Array, base: Float32, delta: Float32) -> float:
    """Return how far a stored weight is from base and experts, as a fraction of its bound.

    Raises:
        ParityError: further than its bound.
    """
    found = _oriented(array, base + delta)
    if found.shape != base.shape:
        raise ParityError(f"the weight {name} in the engine has the shape {list(found.shape)}")
    largest, worst = float(np.abs(delta).max()), 0.0
    step = max(1, ELEMENTS // max(1, base[:1].size))
    for start in range(0, len(base), step):
        rows = slice(start, start + step)
        want, ratio = off_by(found[rows], base[rows], delta[rows], found.dtype, largest)
        error = float(ratio.max())
        if not error <= 1.0:  # NaN is not either
            row, column = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            raise ParityError(
                f"the weight {name} in the engine is off at {[start + int(row), int(column)]}: "
                f"{found[rows][row, column]:.7g}, base and experts give "
                f"{want[row, column]:.7g}, {error:.3g} times the bound",
                fix="this is a bug in the fold or the lowering: report it",
            )
        worst = max(worst, error)
    return worst


def off_by(
    found: Array, base: Float32, delta: Float32, stored: np.dtype[Any], largest: float
) -> tuple[Float64, Float64]:
    """Return what some rows of an adapted weight should be, and how far off they are.

    Args:
        found: the rows as they were written.
        base: the base's.
        delta: what the experts add.
        stored: the type in which they are stored, to which they were rounded once.
        largest: the largest element of what the experts add to the weight as a whole.

    Returns:
        The sum of base and experts, and each element's distance from it as a fraction of its
        bound.
    """
    rounding, smallest = _rounding(stored)
    want = base.astype(np.float64) + delta.astype(np.float64)
    bound = np.maximum(rounding * np.abs(want), smallest) + 1e-5 * largest
    ratio = np.abs(found.astype(np.float64) - want)
    ratio /= np.maximum(bound, np.finfo(np.float64).tiny)
    return want, ratio


def _rounding(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return what one rounding to a type may move a number by: a part of it, and at least."""
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    # float32 was given a whole step: the fold may add up in another order.
    steps = 1.0 if dtype == np.float32 else 0.5
    return steps * float(info.eps), 0.5 * float(info.smallest_subnormal)
