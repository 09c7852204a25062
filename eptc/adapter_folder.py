"""Write one task's low ranks as a stock PEFT LoRA adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptc import bundle
from eptc.architectures import Kind
from eptc.errors import InternalError
from eptc.ir import AdaptedModel, LowRank
from eptc.tensors import Array, LazyTensor

__all__ = ["adapter_rank", "write_adapter"]

_PREFIX = "base_model.model."
_HEADS = ("classifier", "score")
_TASK_TYPES: Mapping[Kind, str] = {
    "encoder-classifier": "SEQ_CLS",
    "encoder-decoder": "SEQ_2_SEQ_LM",
    "decoder-only": "CAUSAL_LM",
}


def adapter_rank(model: AdaptedModel) -> int:
    """Return the largest rank of a factored model's linears; 0 where none has a branch left."""
    return max((delta.A.shape[0] for delta in _low_ranks(model).values()), default=0)


def write_adapter(
    directory: Path,
    model: AdaptedModel,
    head: Mapping[str, LazyTensor],
    kind: Kind,
    base_name: str | None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Every linear's factors go in as they are: PEFT's alpha is each linear's rank, so that its
    factor alpha / r is 1.

    Args:
        directory: an empty folder.
        model: specialised and factored: one plain low rank beside each linear, or none.
        head: the task's own parameters.
        kind: the base's.
        base_name: what the checkpoint calls its base.
    """
    from safetensors.numpy import save_file

    deltas = _low_ranks(model)
    tensors: dict[str, Array] = {}
    for path, delta in deltas.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _float32(delta.A)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = _float32(delta.B)
    for name, tensor in head.items():
        tensors[f"{_PREFIX}{name}"] = _float32(tensor)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {path: delta.A.shape[0] for path, delta in deltas.items()}
    bundle.write_json(directory / "adapter_config.json", _config(ranks, head, kind, base_name))


def _config(
    ranks: Mapping[str, int], head: Mapping[str, LazyTensor], kind: Kind, base_name: str | None
) -> dict[str, Any]:
    largest = max(ranks.values(), default=1)
    # Keys are regular expressions that the end of a module's name has to match.
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[kind],
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "modules_to_save": _owners(head) or None,
        "use_rslora": False,
        "use_dora": False,
    }


def _owners(head: Mapping[str, LazyTensor]) -> list[str]:
    """Return the modules that PEFT is to replace by the task's: heads as a whole."""
    owners = set()
    for name in head:
        first = name.split(".")[0]
        owners.add(first if first in _HEADS else name.rpartition(".")[0])
    return sorted(owners)


def _low_ranks(model: AdaptedModel) -> dict[str, LowRank]:
    found = {}
    for path, adapter in sorted(model.adapters.items()):
        for branch in adapter.branches:
            if not isinstance(branch.delta, LowRank) or path in found:
                raise InternalError(f"{path} is not one plain low rank")
            found[path] = branch.delta
    return found


def _float32(tensor: LazyTensor) -> Array:
    return np.ascontiguousarray(tensor.numpy().astype(np.float32))
