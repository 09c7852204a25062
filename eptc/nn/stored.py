"""A checkpoint's files as they are read: configuration and tensors by native part names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from eptc.errors import CheckpointError, OptionError
from eptc.nn.config import EptConfig

__all__ = ["Stored", "name_some", "read_json", "read_pickle", "read_safetensors"]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint in memory, whatever format it came in.

    Args:
        config: what it says about itself.
        layers: tensors of each adapted linear by part (`A`, `kernels.0`, `router.weight` ...).
        shared: A and B where all linears share them.
        heads: parameters of each task's head, by the task's name, then the parameter's.
    """

    config: EptConfig
    layers: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)


def name_some(names: Sequence[str]) -> str:
    """Return the first three names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as float32.

    Raises:
        CheckpointError: the file cannot be read, or holds integers, NaN or infinities.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", fix="copy or download it again"
        ) from error
    return _as_float32(tensors, path)


def read_pickle(path: Path, *, allowed: bool) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, as float32.

    Args:
        path: the file.
        allowed: whether the caller agreed to read a pickle (tensors only, never code).

    Raises:
        OptionError: the caller did not.
        CheckpointError: the file holds something other than named tensors, integers, NaN ...
    """
    if not allowed:
        raise OptionError(
            f"{path} is a pickle", fix="pass allow_pickle=True if you trust where it came from"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever it leads to
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    named = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )
    if not named:
        raise CheckpointError(f"{path} does not hold tensors by name")
    return _as_float32(tensors, path)


def _as_float32(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    values = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}", expected="a float type")
        values[name] = tensor.to(torch.float32)
        if not torch.isfinite(values[name]).all():
            raise CheckpointError(
                f"{path}: {name} has NaN or infinite values",
                fix="train again from a checkpoint before they appeared",
            )
    return values
