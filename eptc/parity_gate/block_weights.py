"""The weights that an engine stores in fewer bits, for the reference to compute with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from eptc.lower.weights import PACKED
from eptc.nn.adapted import ReferenceModel
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.partition import Partition
from eptc.parity_gate.stored import Quantized

__all__ = ["as_stored"]

# Decoded at once.
_ROWS = 256


def as_stored(
    reference: StreamedModel, task_id: int, partitions: Iterable[Partition]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return what gives the engine's own weight of each module, where it is stored in fewer bits.

    What rounding moves is seen where the weights are compared, each with the sum of base and
    experts. In a block's state it would hide what else is wrong, so the reference computes with
    the weights that were found to be right. 16-bit weights of the base are the reference's own.
    """
    partitions = list(partitions)
    model = reference.model
    modules = _modules(reference, task_id, {n for each in partitions for n in each.weights})
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for partition in partitions:
        for name, kind in {**partition.narrow, **partition.quantized}.items():
            parts = name.split(PACKED)
            widths = [_width(model, modules, part) for part in parts] if len(parts) > 1 else []
            for position, part in enumerate(parts):
                paths = modules.get(part, [])
                adapted = any(path in model.layers for path in paths)
                if kind == reference.dtype(part) and not adapted:
                    continue
                start = sum(widths[:position])
                place = (start, widths[position]) if widths else None
                step = (
                    functools.partial(_decoded, kind, place)
                    if isinstance(kind, Quantized)
                    else functools.partial(_as_stored, partition, name, place)
                )
                found |= dict.fromkeys(paths, step)
    return found


def _modules(reference: StreamedModel, task_id: int, stored: set[str]) -> dict[str, list[str]]:
    """Return which modules compute with a weight, by its name in the plain task model.

    Args:
        reference: the model.
        task_id: the task, by its own list.
        stored: names of the engine's weights; a tied one that is stored for itself is not shared.
    """
    layers = reference.model.layers
    own: dict[str, str] = {}
    for full, _ in reference.model.hf.named_parameters(remove_duplicate=False):
        name = reference.model.plain_name(full, task_id)
        if name.endswith(".weight"):
            path = name.removesuffix(".weight")
            own[name] = path if path in layers else full.removesuffix(".weight")
    return {
        name: [
            own[twin]
            for twin in reference.twins(name)
            if twin == name or (twin in own and twin not in stored and own[twin] not in layers)
        ]
        for name in own
    }


def _width(model: ReferenceModel, modules: Mapping[str, list[str]], name: str) -> int:
    return int(model.hf.get_submodule(modules[name][0]).out_features)


def _decoded(weight: Quantized, place: tuple[int, int] | None, own: torch.Tensor) -> torch.Tensor:
    """Return a weight stored as integers as float32, decoded some rows at a time."""
    decoder = weight.open() if place is None else weight.open().part(*place)
    decoded = torch.empty_like(own)
    for start in range(0, len(own), _ROWS):
        part = slice(start, start + _ROWS)
        decoded[part] = torch.from_numpy(decoder.rows(part, own.shape[1]).numbers)
    return decoded


def _as_stored(
    partition: Partition, name: str, place: tuple[int, int] | None, own: torch.Tensor
) -> torch.Tensor:
    """Return a stored weight the way round that is nearer to the reference's own."""
    array = partition.read(name).astype(np.float32)
    if place is not None:
        array = array[:, place[0] : sum(place)].copy()
    found = torch.from_numpy(array)
    if found.shape != own.shape:
        return found.T
    if found.shape == own.shape[::-1] and (found - own).abs().sum() > (found.T - own).abs().sum():
        return found.T
    return found
