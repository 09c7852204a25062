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

__all__ = ["TuckaSettings", "core", "unit"]

_DEFAULTS = {"r": 8, "k": 3, "t": 3, "p": 2}


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
        """Read `adapter_config.json`; raise CheckpointError where it is not of this system."""
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
        try:
            r, k, t, p = (int(config.get(key, default)) for key, default in _DEFAULTS.items())
            found = cls(r, k, t, p, float(config.get("alpha", 1)))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path / CONFIG} lacks a sound r, k, t, p or alpha: {error}"
            ) from error
        if min(r, k, t, p) < 1 or not math.isfinite(found.alpha):
            raise CheckpointError(f"{path / CONFIG} has r, k, t, p and alpha {found}")
        return found

    def shapes(self, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a linear with `columns` inputs."""
        return {
            "g": (self.k, self.p, self.r, self.r), "c": (self.t, self.p), "u": (columns, self.r),
            "ec": (self.k * self.t, columns),
        }  # fmt: skip


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


def _normalised(array: np.ndarray[Any, Any]) -> Float64:
    exact = array.astype(np.float64)
    return exact / math.sqrt(math.fsum((exact**2).ravel().tolist()))
