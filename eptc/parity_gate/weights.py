"""The weight gate: what was written to disk against the reference's own parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from eptc.errors import ParityError
from eptc.lower.weights import PACKED
from eptc.nn import EptModel

__all__ = ["check_weights"]

Float32 = npt.NDArray[np.float32]


def check_weights(directory: Path, files: list[str], reference: EptModel, task_id: int) -> float:
    """Compare every weight in the engine's files with the reference's parameter of that name.

    A weight without adapters must be equal to the bit. An adapted one may differ by one rounding
    to float32 and by 1e-5 of the largest element of its branches. Weights may be stored
    transposed: whether they are used that way round is seen in the outputs. A packed weight, its
    name the names of its parts with `+` between them, holds them side by side [in, sum of out]:
    each part is compared as if it stood alone.

    Returns:
        The largest deviation of an adapted weight as a fraction of its bound.

    Raises:
        ParityError: a weight is off, or an adapted one is in no file.
    """
    parameters = _parameters(reference, task_id)
    adapted = {f"{path}.weight": layer for path, layer in reference.layers.items()}
    seen, worst = set(), 0.0
    for name, array in _unpacked(_stored(directory, files), parameters):
        if name not in parameters and name not in adapted:
            continue
        seen.add(name)
        if name not in adapted:
            _check_equal(name, array, parameters[name])
            continue
        layer = adapted[name]
        # From the experts' definitions; the layer gate compares the module's own forward.
        delta = layer.dense(task_id).numpy()
        base = layer.weight.detach().numpy()
        want = base.astype(np.float64) + delta.astype(np.float64)
        bound = 2.0**-23 * np.abs(want) + 1e-5 * np.abs(delta).max()
        worst = max(worst, _check_close(name, array, want, bound))
    if missing := sorted(set(adapted) - seen):
        raise ParityError(
            f"the engine has no weight {missing[0]}, which the checkpoint adapts",
            fix="this is a bug in the lowering: report it",
        )
    return worst


def _parameters(reference: EptModel, task_id: int) -> dict[str, Float32]:
    """The reference's parameters under the names the plain task model has."""
    parameters = {}
    for name, parameter in reference.hf.named_parameters(remove_duplicate=False):
        if ".experts." in name or ".router." in name or name.endswith(".task_embedding"):
            continue
        plain = name
        for path in reference.layers:
            if name.startswith(f"{path}.base."):
                plain = f"{path}.{name.removeprefix(f'{path}.base.')}"
        for head in reference.heads:
            if name.startswith(f"{head}.tasks."):
                number, _, rest = name.removeprefix(f"{head}.tasks.").partition(".")
                plain = f"{head}.{rest}" if int(number) == task_id else ""
        if plain:
            parameters[plain] = parameter.detach().numpy()
    return parameters


def _stored(directory: Path, files: list[str]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield each initializer once, read from disk one at a time."""
    seen = set()
    for file in files:
        model = onnx_ir.load(directory / file)
        for value in model.graph.initializers.values():
            if value.name in seen or value.const_value is None:
                continue
            seen.add(value.name)
            tensor = value.const_value
            # A copy: the file is unmapped before the next one is read.
            yield str(value.name), np.array(tensor.numpy())
            if isinstance(tensor, onnx_ir.ExternalTensor):
                tensor.release()


def _unpacked(
    stored: Iterable[tuple[str, npt.NDArray[Any]]], parameters: Mapping[str, Float32]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the parts of packed weights by their own names, other weights as they are."""
    for name, array in stored:
        parts = name.split(PACKED)
        if len(parts) == 1:
            yield name, array
            continue
        if lost := [part for part in parts if part not in parameters]:
            raise ParityError(
                f"the engine packs {lost[0]} into {name}, and the reference has no such weight",
                fix="this is a bug in the pass that packs: report it",
            )
        widths = [parameters[part].shape[0] for part in parts]
        if array.ndim != 2 or array.shape[1] != sum(widths):
            raise ParityError(
                f"the weight {name} in the engine has the shape {list(array.shape)}",
                expected=f"{sum(widths)} columns: {' + '.join(map(str, widths))}",
                fix="this is a bug in the pass that packs: report it",
            )
        ends = np.cumsum(widths)
        yield from zip(parts, np.split(array, ends[:-1], axis=1), strict=True)


def _oriented(array: npt.NDArray[Any], want: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array the way round that is nearer to what is expected."""
    if array.ndim != 2 or array.shape == want.shape != want.shape[::-1]:
        return array
    if array.shape == want.shape and np.abs(array - want).sum() <= np.abs(array.T - want).sum():
        return array
    return array.T


def _check_equal(name: str, array: npt.NDArray[Any], want: Float32) -> None:
    found = _oriented(array, want)
    if found.shape != want.shape or not np.array_equal(found, want):
        detail = f"shape {list(found.shape)}, expected {list(want.shape)}"
        if found.shape == want.shape:
            at = np.unravel_index(int(np.argmax(np.abs(found - want))), want.shape)
            detail = f"element {[int(i) for i in at]} is {found[at]}, the reference has {want[at]}"
        raise ParityError(
            f"the weight {name} in the engine is not the base's: {detail}",
            expected="the base's weight to the bit",
            fix="check --base; if it is right, this is a bug in the lowering: report it",
        )


def _check_close(
    name: str,
    array: npt.NDArray[Any],
    want: npt.NDArray[np.float64],
    bound: npt.NDArray[np.float64],
) -> float:
    found = _oriented(array, want)
    if found.shape != want.shape:
        raise ParityError(f"the weight {name} in the engine has the shape {list(found.shape)}")
    ratio = np.abs(found - want) / np.maximum(bound, np.finfo(np.float64).tiny)
    error = float(np.nan_to_num(ratio, nan=np.inf).max())
    if not error <= 1.0:
        at = np.unravel_index(int(np.argmax(ratio)), want.shape)
        raise ParityError(
            f"the weight {name} in the engine is off at {[int(i) for i in at]}: {found[at]:.7g}, "
            f"base and experts give {want[at]:.7g}, {error:.3g} times the bound",
            fix="this is a bug in the fold or the lowering: report it",
        )
    return error
