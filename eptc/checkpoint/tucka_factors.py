"""What TuckA's tensors mean: the adapter's configuration, and factors divided by their norms."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from eptc.checkpoint.base import read_json
from eptc.checkpoint.peft_folder import CONFIG
from eptc.errors import CheckpointError
from eptc.ir import Float64
from eptc.tensors import LazyTensor

__all__ = ["TuckaSettings", "core", "norm_fits", "unit"]

_SIZES = ("r", "k", "t", "p")
# What each part's axes are; None is the number of inputs.
_AXES: dict[str, tuple[str | None, ...]] = {
    "g": ("k", "p", "r", "r"), "c": ("t", "p"), "u": (None, "r"), "ec": ("k * t", None),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TuckaSettings:
    """What the configuration says.

    Args:
        r: inner rank.
        k: how many groups.
        t: experts of a group.
        p: slices of a group that its experts mix.
        alpha: factor of the adapters, used as it is.
    """

    r: int
    k: int
    t: int
    p: int
    alpha: float

    @classmethod
    def read(cls, path: Path) -> TuckaSettings:
        """Read `adapter_config.json`.

        Raises:
            CheckpointError: it is not of this system, or lacks a key that changes the answers:
                what the authors' code takes where none is given need not be what was trained.
        """
        config = read_json(path / CONFIG, CheckpointError)
        if config.get("peft_type") != "TUCKA":
            raise CheckpointError(
                f"{path / CONFIG} has peft_type {config.get('peft_type')!r}", expected="'TUCKA'"
            )
        if config.get("use_alb"):
            raise CheckpointError(
                f"{path / CONFIG} has use_alb = {config['use_alb']!r}",
                expected="false: with it the authors' code cannot build a model, so that none "
                "was trained with it",
                fix="use the adapter_config.json that the training run saved",
            )
        if lost := [key for key in (*_SIZES, "alpha") if config.get(key) is None]:
            raise CheckpointError(
                f"{path / CONFIG} has no {', '.join(lost)}",
                expected="r, k, t, p and alpha, which the training run writes",
                fix=f"add {', '.join(lost)} to it as the training command had them",
            )
        sizes = [config[key] for key in _SIZES]
        alpha = config["alpha"]
        sound = all(type(size) is int and size > 0 for size in sizes)
        if not sound or type(alpha) not in (int, float) or not math.isfinite(alpha):
            given = ", ".join(f"{key} = {config[key]!r}" for key in (*_SIZES, "alpha"))
            raise CheckpointError(
                f"{path / CONFIG} has {given}",
                expected="sound r, k, t, p and alpha: positive whole numbers and a finite one",
                fix="use the adapter_config.json that the training run saved",
            )
        r, k, t, p = sizes
        return cls(r, k, t, p, float(alpha))

    def shapes(self, columns: int | None) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of each part of a linear with `columns` inputs, None for any."""
        sizes = self._sizes()
        return {
            part: tuple(columns if axis is None else sizes[axis] for axis in axes)
            for part, axes in _AXES.items()
        }

    def check(self, path: Path, part: str, tensor: LazyTensor) -> None:
        """Check that a part of an adapter has the sizes the configuration says.

        Raises:
            CheckpointError: the two contradict each other; the keys, and what the tensor has.
        """
        axes, sizes = _AXES[part], self._sizes()
        if len(tensor.shape) != len(axes):
            said = [f"that it has {len(axes)} axes"]
        else:
            pairs = dict(zip(axes, tensor.shape, strict=True)).items()
            said = [f"{axis} = {sizes[axis]}" for axis, n in pairs if axis and sizes[axis] != n]
            if part == "g" and tensor.shape[2] != tensor.shape[3]:
                said = [f"r = {self.r}"]
        if said:
            wanted = ", ".join("inputs" if axis is None else axis for axis in axes)
            raise CheckpointError(
                f"{path / CONFIG} says {', '.join(said)}, and {tensor.name} has the shape "
                f"{list(tensor.shape)}",
                expected=f"[{wanted}]",
                fix="use the adapter_config.json and the tensors of one training run",
            )

    def _sizes(self) -> dict[str, int]:
        return {"r": self.r, "k": self.k, "t": self.t, "p": self.p, "k * t": self.k * self.t}


def unit(tensor: LazyTensor) -> Float64:
    """Return a tensor divided by the norm of all its numbers."""
    return _normalised(np.asarray(tensor.numpy()))


def core(g: LazyTensor, c: LazyTensor, group: int, slot: int) -> Float64:
    """Return an expert's core [r, r]: its mixture of the group's slices."""
    slices = _normalised(np.asarray(g.numpy())[group])
    mixing = unit(c)[slot]
    total = np.zeros(slices.shape[1:])
    for weight, matrix in zip(mixing, slices, strict=True):
        total += weight * matrix
    return total


def norm_fits(array: np.ndarray[Any, Any]) -> bool:
    """Whether the sum of an array's squares is a normal number of float32.

    Training divided by norms in float32: by one that overflowed, or vanished, it cannot have.
    """
    limits = np.finfo(np.float32)
    total = np.square(array.astype(np.float64)).sum()
    return bool(limits.tiny <= total <= limits.max)


def _normalised(array: np.ndarray[Any, Any]) -> Float64:
    exact = array.astype(np.float64)
    return exact / math.sqrt(math.fsum((exact**2).ravel().tolist()))
