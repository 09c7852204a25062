"""Random checkpoints of every system that routes on the input, as its own code saves them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.random_weights import generator, meta_model

if TYPE_CHECKING:
    from eptc.checkpoint import Routing

__all__ = ["PROMPTS", "VARIANTS", "Variant"]

# EPT, as in its training example and paper: two experts of each size, two of eight used.
_KERNEL_SIZES = (2, 2, 4, 4, 8, 8, 16, 16)
_EPT_TARGETS = {
    "bert": ("query", "key", "value", "intermediate.dense", "output.dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}
# TuckA, as its authors adapt classifiers.
_TUCKA = {"r": 8, "k": 2, "t": 2, "p": 2, "alpha": 2}
_TUCKA_TARGETS = {
    "bert": ("query", "value", "dense"),
    "deberta-v2": ("query_proj", "value_proj", "dense"),
}
_LABELS = 2
# MEPT and SMoP, by default: four experts of ten prompts.
PROMPTS, _ALL_PROMPTS = 10, 40


@dataclasses.dataclass(frozen=True)
class Variant:
    """A system with its settings.

    Args:
        name: what `--systems` calls it.
        model_types: the models it is measured on.
        write: writes a checkpoint, given the base's folder and its own.
        routing: as for `eptc.export`.
    """

    name: str
    model_types: tuple[str, ...]
    write: Callable[[Path, Path], None]
    routing: Routing = "exact"


def _write_ept(base: Path, folder: Path, *, shared: bool) -> None:
    """Write a native checkpoint whose routers read each token and the task.

    Args:
        base: folder of the base model.
        folder: of the checkpoint.
        shared: whether all linears have one A and B.
    """
    import torch

    from eptc.nn import EptConfig, EptModel, GateConfig, load_base
    from eptc.tasks import Task

    hf_model = load_base(base)
    writes = hf_model.config.is_encoder_decoder
    task = Task("a", "generation") if writes else Task("a", "classification", labels=("no", "yes"))
    config = EptConfig(
        variant="paper",
        targets=_EPT_TARGETS[hf_model.config.model_type],
        kernel_sizes=_KERNEL_SIZES,
        top_k=2,
        rank=8,
        tasks=(task,),
        gate=GateConfig("token+task"),
        sharing="model" if shared else "per-linear",
    )
    model = EptModel.attach(hf_model, config)
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".kernels." in name:
            # So that the experts move an output by about a tenth of itself.
            torch.nn.init.normal_(parameter, std=0.02, generator=drawn)
    model.save(folder, base_dir=base)


def _write_tucka(base: Path, folder: Path) -> None:
    """Write a TuckA adapter of a classifier: `adapter_config.json` and its tensors."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    targets = _TUCKA_TARGETS[config.model_type]
    r, k, t, p = (_TUCKA[key] for key in "rktp")
    linears = {
        path: module.weight.shape[1]
        for path, module in meta_model(config).named_modules()
        if path.rpartition(".")[2] in targets
    }
    # The first linear routes for all.
    first, width = next(iter(linears.items()))
    shapes: dict[str, tuple[int, ...]] = {f"{first}.tucka_ec": (k * t, width)}
    for path, columns in linears.items():
        shapes[f"{path}.tucka_g"] = (k, p, r, r)
        shapes[f"{path}.tucka_c"] = (t, p)
        shapes[f"{path}.tucka_u"] = (columns, r)
    shapes["classifier.weight"] = (_LABELS, config.hidden_size)
    shapes["classifier.bias"] = (_LABELS,)
    told = {"peft_type": "TUCKA", "task_type": "SEQ_CLS", "use_alb": False, **_TUCKA}
    names = {f"base_model.model.{name}": shape for name, shape in shapes.items()}
    _write(folder, "adapter_model", names, {"adapter_config.json": told})


def _write_prompts(base: Path, folder: Path, *, method: str, top_k: int, every: int = 1) -> None:
    """Write what MEPT or SMoP trained on a T5, and the settings it was trained with.

    Args:
        base: folder of the base model.
        folder: of the checkpoint.
        method: `prompt-expert` (MEPT) or `prompt-routing` (SMoP, prompts of the text alone).
        top_k: how many experts are mixed.
        every: 1: every encoder block replaces the prompts; 2: every second one, the first not.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    mept = method == "prompt-expert"
    layers = list(range(every - 1, config.num_layers, every)) if mept else []
    sites = {"prompt_encoder.": "prompt_encoder."}
    sites |= {
        f"base_model.encoder.block.{i}.": f"base_model.encoder.block.{i}.prompt_" for i in layers
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for site, prefix in sites.items():
        shapes[f"{prefix}embedding.weight"] = (_ALL_PROMPTS, config.d_model)
        shapes[f"{prefix}router.0.weight"] = (_ALL_PROMPTS // PROMPTS, config.d_model)
        if mept:
            shapes[f"{site}shared_embedding"] = (1, PROMPTS, config.d_model)
    told = {
        "num_virtual_tokens": PROMPTS, "num_virtual_tokens_full": _ALL_PROMPTS, "topk": top_k,
        "stochastic": False, "gumbel": False,
    }  # fmt: skip
    trained = {
        **told, "method": method, "layers": layers, "shared_expert": mept,
        "shared_expert_ratio": "one", "tokenizer_length": config.vocab_size,
    }  # fmt: skip
    adapter = {**told, "peft_type": "PROMPT_EXPERT" if mept else "PROMPT_ROUTING"}
    settings = {"adapter_config.json": adapter, "train_args.json": trained}
    _write(folder, "trainable_only", shapes, settings)


def _write(
    folder: Path,
    stem: str,
    shapes: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write random tensors of some shapes, and settings by the name of their file."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tensors = {
        name: generator(name, 0).standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def _mept(top_k: int, every: int = 1) -> Callable[[Path, Path], None]:
    return functools.partial(_write_prompts, method="prompt-expert", top_k=top_k, every=every)


_BERT_T5, _CLASSIFIERS, _T5 = ("bert", "t5"), ("bert", "deberta-v2"), ("t5",)
_SMOP = functools.partial(_write_prompts, method="prompt-routing", top_k=1)

VARIANTS = (
    Variant("ept-per-linear", _BERT_T5, functools.partial(_write_ept, shared=False)),
    Variant("ept-shared", _BERT_T5, functools.partial(_write_ept, shared=True)),
    Variant("tucka-batch", _CLASSIFIERS, _write_tucka),
    Variant("tucka-per-sample", _CLASSIFIERS, _write_tucka, "per-sample"),
    Variant("mept-top1-batch", _T5, _mept(1)),
    Variant("mept-top1-per-sample", _T5, _mept(1), "per-sample"),
    Variant("mept-top2", _T5, _mept(2)),
    Variant("mept-half-top1-batch", _T5, _mept(1, every=2)),
    Variant("mept-half-top1-per-sample", _T5, _mept(1, every=2), "per-sample"),
    Variant("mept-half-top2-batch", _T5, _mept(2, every=2)),
    Variant("smop-batch", _T5, _SMOP),
    Variant("smop-per-sample", _T5, _SMOP, "per-sample"),
)
