"""Write one task's low ranks as a stock PEFT LoRA adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from eptc import bundle
from eptc.architectures import Kind
from eptc.errors import InternalError
from eptc.ir import AdaptedModel, LowRank
from eptc.ir.folding import folded
from eptc.tensors import Array, LazyTensor, cast

__all__ = ["low_ranks", "write_adapter"]

_PREFIX = "base_model.model."
# A classification head: PEFT takes these modules for a task's own, whatever its file says.
_HEADS = ("classifier", "score")
_TASK_TYPES: Mapping[Kind, str] = {
    "encoder-classifier": "SEQ_CLS",
    "encoder-decoder": "SEQ_2_SEQ_LM",
    "decoder-only": "CAUSAL_LM",
}


def low_ranks(model: AdaptedModel) -> dict[str, LowRank | None]:
    """Return the one low rank beside each linear, None where it has no branch left.

    Raises:
        InternalError: the model was not factored.
    """
    found: dict[str, LowRank | None] = {}
    for path, adapter in sorted(model.adapters.items()):
        deltas = [branch.delta for branch in adapter.branches]
        if len(deltas) > 1 or not all(isinstance(delta, LowRank) for delta in deltas):
            raise InternalError(f"{path} is not one plain low rank")
        found[path] = next((d for d in deltas if isinstance(d, LowRank)), None)
    return found


def write_adapter(
    directory: Path,
    model: AdaptedModel,
    exact: AdaptedModel,
    own: Iterable[str],
    kind: Kind,
    base_name: str | None,
) -> int:
    """Write `adapter_config.json` and `adapter_model.safetensors`; return the rank.

    Every linear gets the largest rank of all: rows and columns of zeros change nothing, and
    programs that read one `r` and one `lora_alpha` for all linears, as most that serve do,
    scale right. Alpha is the rank, so that PEFT's factor alpha / r is 1. A head is written
    whole, what is adapted of it folded in: PEFT adapts nothing inside of a module that it
    replaces.

    Args:
        directory: an empty folder.
        model: specialised and factored (`eptc.pipeline.factoring_passes`).
        exact: the same before ranks were cut: what is folded into a head has no rank to cut.
        own: parameters that the task has of its own.
        kind: the base's.
        base_name: what the checkpoint calls its base.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    modules = _own_modules(own, model.weights, kind)
    saved = {
        name: _saved(exact, name)
        for name in model.weights
        if any(name.startswith(f"{module}.") for module in modules)
    }
    ranks = {path: d for path, d in low_ranks(model).items() if f"{path}.weight" not in saved}
    largest = max((d.A.shape[0] for d in ranks.values() if d is not None), default=0)
    rank = max(1, largest)  # PEFT knows no rank 0
    tensors: dict[str, Array] = {f"{_PREFIX}{name}": array for name, array in saved.items()}
    for path, delta in ranks.items():
        out, columns = model.weights[f"{path}.weight"].shape
        a, b = np.zeros((rank, columns), np.float32), np.zeros((out, rank), np.float32)
        if delta is not None:
            a[: delta.A.shape[0]] = cast(delta.A.numpy(), "float32")
            b[:, : delta.B.shape[1]] = cast(delta.B.numpy(), "float32")
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b
    file = directory / "adapter_model.safetensors"
    with bundle.written_by("safetensors", file, SafetensorError):
        save_file(tensors, file, metadata={"format": "pt"})
    bundle.share(file)
    linears = [n.removesuffix(".weight") for n, t in model.weights.items() if len(t.shape) == 2]
    bundle.write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": _TASK_TYPES[kind],
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": _targets(ranks, linears),
            "modules_to_save": modules or None,
            "use_rslora": False,
            "use_dora": False,
        },
    )
    return largest


def _saved(model: AdaptedModel, name: str) -> Array:
    """Return a parameter of a head in float32, what is adapted of it folded in."""
    tensor: LazyTensor = model.weights[name]
    adapter = model.adapters.get(name.removesuffix(".weight"))
    if adapter is not None and adapter.parameter == name and adapter.branches:
        tensor = folded(tensor, adapter, "float32")
    return np.ascontiguousarray(cast(tensor.numpy(), "float32"))


def _own_modules(own: Iterable[str], names: Collection[str], kind: Kind) -> list[str]:
    """Return the modules that PEFT is to replace by the task's: a classification head as a whole.

    An encoder's head is among them even where it is the base's: PEFT looks for it in the file.
    """
    found = {name.partition(".")[0] for name in names if kind == "encoder-classifier"}
    modules = {name for name in found if name in _HEADS}
    for name in own:
        if name.partition(".")[0] not in modules:
            modules.add(name.rpartition(".")[0])
    return sorted(modules)


def _targets(adapted: Collection[str], linears: Iterable[str]) -> list[str]:
    """Return what PEFT is to adapt: last names where every linear of that name is, else paths.

    Programs that serve adapters know last names, such as `q_proj`.
    """
    left = {path.rpartition(".")[2] for path in linears if path not in adapted}
    return sorted(
        {last if (last := path.rpartition(".")[2]) not in left else path for path in adapted}
    )
