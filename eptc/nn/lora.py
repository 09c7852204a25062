"""Stock PEFT LoRA in PyTorch: y = W0 x + b + alpha / r * B A x."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eptc.errors import CheckpointError
from eptc.nn.adapted import AdaptedLinear, SingleTaskModel
from eptc.nn.base import read_base, require
from eptc.nn.meta_base import MetaBase
from eptc.nn.replace import replace_parameters
from eptc.nn.stored import read_json, read_pickle, read_safetensors
from eptc.nn.streamed import StreamedModel
from eptc.tasks import Task

__all__ = ["LoraLinear", "LoraModel", "load_lora", "stream_lora"]


class LoraLinear(AdaptedLinear):
    """y = W0 x + bias + scaling * B (A x).

    Args:
        base: the linear that is adapted.
        path: its full name.
        A: [r, in].
        B: [out, r].
        scaling: factor of the branch.
    """

    def __init__(self, base: nn.Linear, path: str, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__(base, path)
        self.A = nn.Parameter(A, requires_grad=False)
        self.B = nn.Parameter(B, requires_grad=False)
        self.scaling = scaling

    def delta(self, x: Tensor, task_id: int | None = None) -> Tensor:  # noqa: ARG002  # there is one
        """Return the branch alone [..., out] for x [..., in]."""
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B) * self.scaling

    def dense(self, task_id: int | None = None) -> Tensor:  # noqa: ARG002
        """Return the matrix [out, in] the branch stands for."""
        return self.scaling * (self.B @ self.A)


class LoraModel(SingleTaskModel):
    """A Hugging Face model with a `LoraLinear` in the place of every adapted linear."""

    layers: Mapping[str, LoraLinear]

    def __init__(self, hf_model: Any, layers: Mapping[str, LoraLinear], task: Task) -> None:
        super().__init__(hf_model, task)
        self.layers = layers
        for path, layer in layers.items():
            hf_model.set_submodule(path, layer)


def load_lora(
    checkpoint: Path, base_dir: Path, *, task: Task, allow_pickle: bool = False
) -> LoraModel:
    """Return an adapter on its base, in eval mode.

    Args:
        checkpoint: the adapter's folder.
        base_dir: the base model's folder.
        task: what it was trained on.
        allow_pickle: whether `adapter_model.bin` may be read.

    Raises:
        CheckpointError: the adapter is damaged or does not fit the base.
        BaseModelError: the base cannot be used.
    """
    hf_model, missing = read_base(base_dir)
    return _model(checkpoint, base_dir, hf_model, missing, task, allow_pickle)


def stream_lora(
    checkpoint: Path, base_dir: Path, *, task: Task, allow_pickle: bool = False
) -> StreamedModel:
    """Return an adapter on a base that stays on disk; arguments and errors as `load_lora`."""
    base = MetaBase(base_dir)
    model = _model(checkpoint, base_dir, base.hf, base.missing, task, allow_pickle)
    return StreamedModel(model, base)


def _model(
    checkpoint: Path, base_dir: Path, hf_model: Any, missing: list[str], task: Task,
    allow_pickle: bool,
) -> LoraModel:  # fmt: skip
    config = read_json(checkpoint / "adapter_config.json")
    if (checkpoint / "adapter_model.safetensors").is_file():
        tensors = read_safetensors(checkpoint / "adapter_model.safetensors")
    else:
        tensors = read_pickle(checkpoint / "adapter_model.bin", allowed=allow_pickle)
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("base_model.model.")
        for part in ("A", "B"):
            if plain.endswith(f".lora_{part}.weight"):
                pairs.setdefault(plain.removesuffix(f".lora_{part}.weight"), {})[part] = tensor
                break
        else:
            if ".original_module." not in plain:  # what a trained copy stands for
                plain = re.sub(r"\.(modules_to_save|base_layer)(?=\.)", "", plain)
                others[plain.replace(".default.", ".")] = tensor
    replace_parameters(hf_model, others)
    require(base_dir, [name for name in missing if name not in others])
    layers = {}
    for path, pair in sorted(pairs.items()):
        linear = hf_model.get_submodule(path)
        rank = len(pair["A"])
        if not isinstance(linear, nn.Linear) or pair["B"].shape != (linear.out_features, rank):
            raise CheckpointError(f"{checkpoint} does not fit the linear {path} of {base_dir}")
        scaling = _alpha(config, path) / (rank**0.5 if config.get("use_rslora") else rank)
        layers[path] = LoraLinear(linear, path, pair["A"], pair["B"], scaling)
    return LoraModel(hf_model, layers, task).eval()


def _alpha(config: Mapping[str, Any], path: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return float(alpha)
    return float(config["lora_alpha"])
