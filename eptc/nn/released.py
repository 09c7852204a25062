"""The authors' own folders (an adapted PEFT LoRA): every tensor mapped by its exact name.

They store neither how many experts a task uses nor the tasks: the caller must say.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eptc.errors import CheckpointError, OptionError
from eptc.nn.config import EptConfig
from eptc.nn.rules import ModuleConfig, ScaleConfig
from eptc.nn.stored import Stored, name_some, read_json, read_pickle, read_safetensors
from eptc.tasks import GLUE, Task, tasks_from_names

__all__ = ["CONFIG", "read"]

CONFIG = "adapter_config.json"
EXPERTS = 8

_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_(?:(?P<factor>[AB])\.weight|gate\.0\.(?P<gate>weight|"
    r"bias)|(?P<embedding>task_embedding)\.weight|expert_kernels\.(?P<kernel>\d+))"
)
# Options whose other values change what the tensors mean.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "fan_in_fan_out": (False, None),
    "loftq_config": ({}, None),
    "init_lora_weights": (True, False, None, "gaussian"),
}


def read(
    directory: Path,
    *,
    top_k: int | None,
    tasks: Sequence[str | Task] | None,
    allow_pickle: bool = False,
) -> Stored:
    """Return a checkpoint the authors' training script wrote.

    Args:
        directory: the folder with `adapter_config.json`.
        top_k: how many experts a task uses; clamped to 1..8 as the released code does.
        tasks: tasks in the order of their ids; names of published tasks bring their prompts.
        allow_pickle: whether `adapter_model.bin` may be read.

    Raises:
        OptionError: `top_k` or `tasks` is not given, or does not fit.
        CheckpointError: a file, an option or a tensor is missing, damaged or not supported.
    """
    options = _read_options(directory)
    if top_k is None:
        raise OptionError(
            "the checkpoint does not say how many experts a task uses",
            fix="pass top_k: --moe_top_k of the training script (published: 2; its default: 1)",
        )
    if tasks is None:
        raise OptionError(
            "the checkpoint does not name its tasks",
            fix="pass tasks: --tasks of the training script, in its order",
        )
    if len(tasks) > EXPERTS:
        raise OptionError(f"{len(tasks)} tasks are named", expected=f"at most {EXPERTS}")
    layers = _map_names(_read_tensors(directory, allow_pickle))
    names = tasks_from_names([t.name if isinstance(t, Task) else t for t in tasks], GLUE)
    given = zip(tasks, names, strict=True)
    try:
        config = EptConfig(
            variant="released",
            targets=_targets(options, layers),
            kernel_sizes=_kernel_sizes(layers),
            top_k=min(max(top_k, 1), EXPERTS),
            rank=options["r"],
            tasks=tuple(task if isinstance(task, Task) else named for task, named in given),
            scale=ScaleConfig(
                "alpha/sqrt(r)" if options.get("use_rslora") else "alpha/r",
                alpha=options["lora_alpha"],
            ),
            modules=_overrides(options, layers),
        )
    except OptionError as error:
        raise CheckpointError(
            f"{directory / CONFIG}: {error.found}", expected=error.expected
        ) from error
    return Stored(config, layers)


def _read_options(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}")
    options = read_json(directory / CONFIG)
    for key, plain in _PLAIN.items():
        if key in options and options[key] not in plain:
            raise CheckpointError(
                f"{directory / CONFIG}: {key} is {options[key]!r}, which is not supported",
                expected=" or ".join(map(repr, plain)),
            )
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in options:
            raise CheckpointError(f"{directory / CONFIG} has no {key!r}")
    return options


def _read_tensors(directory: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (path := directory / "adapter_model.safetensors").is_file():
        return read_safetensors(path)
    if (path := directory / "adapter_model.bin").is_file():
        return read_pickle(path, allowed=allow_pickle)
    raise CheckpointError(
        f"{directory} has no adapter_model.safetensors",
        expected="adapter_model.safetensors or adapter_model.bin",
    )


def _map_names(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by linear and native part; every one has exactly one place."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            unknown.append(name)
        elif match["kernel"] is not None:
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[3] != 1:
                raise CheckpointError(
                    f"{name} has the shape {list(tensor.shape)}", expected="[1, cells, size, 1]"
                )
            layers[match["path"]][f"kernels.{match['kernel']}"] = tensor[0, :, :, 0]
        else:
            gate = f"router.{match['gate']}" if match["gate"] else None
            layers[match["path"]][match["factor"] or gate or match["embedding"]] = tensor
    if unknown:
        raise CheckpointError(f"the checkpoint has tensors without a place: {name_some(unknown)}")
    if not layers:
        raise CheckpointError("the checkpoint has no tensors")
    for path, parts in layers.items():
        _check_counts(path, parts)
    return dict(layers)


def _check_counts(path: str, parts: Mapping[str, Tensor]) -> None:
    kernels = {part for part in parts if part.startswith("kernels.")}
    if kernels != {f"kernels.{i}" for i in range(EXPERTS)}:
        raise CheckpointError(
            f"{path} has the kernels {', '.join(sorted(kernels)) or 'none'}",
            expected=f"kernels.0 to kernels.{EXPERTS - 1}",
        )
    for part in ("router.weight", "router.bias", "task_embedding"):
        if part in parts and len(parts[part]) != EXPERTS:
            raise CheckpointError(
                f"{path}: {part} has {len(parts[part])} rows", expected=f"{EXPERTS}"
            )


def _kernel_sizes(layers: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, ...]:
    sizes = {
        path: tuple(parts[f"kernels.{i}"].shape[1] for i in range(EXPERTS))
        for path, parts in layers.items()
    }
    first, *others = sizes
    for path in others:
        if sizes[path] != sizes[first]:
            raise CheckpointError(
                f"{path} has the kernel sizes {sizes[path]}",
                expected=f"{sizes[first]}, as {first} has",
            )
    return sizes[first]


def _targets(options: Mapping[str, Any], layers: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the target names; full ones where PEFT was given an expression or some layers."""
    targets = options["target_modules"]
    if isinstance(targets, str) or options.get("layers_to_transform") is not None:
        targets = list(layers)
    if not isinstance(targets, list):
        raise CheckpointError(f"target_modules is {targets!r}", expected="a list of names")
    return tuple(sorted(targets))


def _overrides(options: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, ModuleConfig]:
    """Return what rank_pattern and alpha_pattern change.

    As PEFT does it, the first key that fits, ranks before alphas, is looked up in both.
    """
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    modules = {}
    for path in layers:
        keys = (key for key in (*ranks, *alphas) if re.match(rf".*\.{key}$", path))
        key = next(keys, path)
        if key in ranks or key in alphas:
            modules[path] = ModuleConfig(ranks.get(key), alphas.get(key))
    return modules
