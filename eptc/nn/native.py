"""The native format: `ept_config.json` and `ept_model.safetensors`, complete in themselves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from eptc.errors import CheckpointError, OutputError
from eptc.nn.config import EptConfig
from eptc.nn.stored import Stored, name_some, read_json, read_safetensors

__all__ = ["CONFIG", "WEIGHTS", "read", "write"]

CONFIG = "ept_config.json"
WEIGHTS = "ept_model.safetensors"


def read(directory: Path) -> Stored:
    """Return a native checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor's name fits nothing.
        TaskError: a task is not well formed.
    """
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} has no {name}", expected=f"{CONFIG} and {WEIGHTS}")
    config = EptConfig.from_json(read_json(directory / CONFIG))
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    heads: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in read_safetensors(directory / WEIGHTS).items():
        path, separator, part = name.partition(".ept.")
        task = _head_task(name, config)
        if task is not None:
            heads[task][name.removeprefix(f"heads.{task}.")] = tensor
        elif separator:
            layers[path][part] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{directory / WEIGHTS} has tensors without a place: {name_some(sorted(unknown))}",
            expected="<module>.ept.<part>, shared.ept.<part>, heads.<task>.<parameter>",
        )
    shared = layers.pop("shared", {}) if config.sharing == "model" else {}
    return Stored(config, dict(layers), shared, dict(heads))


def _head_task(name: str, config: EptConfig) -> str | None:
    """Return the task whose head a tensor belongs to: the longest name that fits."""
    fits = [task.name for task in config.tasks if name.startswith(f"heads.{task.name}.")]
    return max(fits, key=len, default=None)


def write(directory: Path, config: EptConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a native checkpoint into a folder, over one that is there.

    Each file appears whole or not at all. The configuration goes first and comes back last:
    a folder in which a write was cut off is not a checkpoint.

    Raises:
        OutputError: the folder cannot be written.
    """
    stored = {name: t.detach().cpu().float().contiguous() for name, t in tensors.items()}
    text = json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)
        part = directory / f".{WEIGHTS}.part"
        safetensors.torch.save_file(stored, part, metadata={"format": "pt"})
        part.replace(directory / WEIGHTS)
        part = directory / f".{CONFIG}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(directory / CONFIG)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{directory} cannot be written: {error}") from error
