"""Tiny models with random weights, and the folders they are saved in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from eptc.nn import EptConfig, EptModel, load_base
from eptc.tasks import GLUE, Task

Trained = Callable[..., EptModel]


def _bert_shape(**changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": 40,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 50,
        "max_position_embeddings": 24,
    }
    return {**shape, **changes}


def _model(kind: str, **changes: Any) -> Any:
    import transformers

    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**_bert_shape(**changes)))
    if kind == "bert-classifier":
        config = transformers.BertConfig(**_bert_shape(**changes))
        return transformers.BertForSequenceClassification(config)
    if kind == "roberta":
        config = transformers.RobertaConfig(**_bert_shape(pad_token_id=1, **changes))
        return transformers.RobertaModel(config, add_pooling_layer=False)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=10, d_ff=50, num_layers=1, num_heads=3,
            decoder_start_token_id=0, **changes,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.LlamaConfig(
        **_bert_shape(hidden_size=32, num_key_value_heads=1, **changes)
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with tensors this small a second one only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a tiny base of a kind and returns its folder."""

    def make(kind: str = "bert", seed: int = 0, **changes: Any) -> Path:
        directory = tmp_path / f"base-{kind}-{seed}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _model(kind, **changes).save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def plain() -> EptConfig:
    """Return a configuration for the tiny BERT, with a task of each kind."""
    tasks = (
        Task("sentiment", "classification", labels=("negative", "positive"), aliases=("mood",)),
        Task("topic", "classification", labels=("a", "b", "c")),
        Task("score", "regression"),
    )
    return EptConfig(
        variant="paper",
        targets=("query", "intermediate.dense"),
        kernel_sizes=(2, 3, 4),
        top_k=2,
        rank=4,
        tasks=tasks,
    )


@pytest.fixture
def released(plain: EptConfig) -> EptConfig:
    """Return what an authors' folder can hold, for the tiny Llama: 8 experts and 8 tasks."""
    return dataclasses.replace(
        plain,
        variant="released",
        gate=None,
        targets=("q_proj", "down_proj"),
        kernel_sizes=(2, 2, 3, 3, 4, 4, 6, 6),
        tasks=tuple(
            GLUE[name] for name in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
        ),
    )


@pytest.fixture
def trained() -> Trained:
    """Return a function that attaches a configuration to a base, every parameter random."""
    return _trained


@pytest.fixture
def write_released() -> Callable[..., Path]:
    """Return a function that writes a model as the released code does."""
    return _write_released


def _trained(base: Path, config: EptConfig, **options: Any) -> EptModel:
    """Return a model whose every trainable parameter is random: no zeros that hide mistakes."""
    model = EptModel.attach(load_base(base), config, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def _write_released(model: EptModel, directory: Path, **options: Any) -> Path:
    """Write a model as the released code does."""
    directory.mkdir()
    tensors = {}
    for path, layer in model.layers.items():
        for part, parameter in layer.parts().items():
            name, _, index = part.partition("kernels.")
            name = {
                "A": "lora_A.weight",
                "B": "lora_B.weight",
                "router.weight": "lora_gate.0.weight",
                "router.bias": "lora_gate.0.bias",
                "task_embedding": "lora_task_embedding.weight",
                "": f"lora_expert_kernels.{index}",
            }[name]
            tensor = parameter.detach().clone()
            tensors[f"base_model.model.{path}.{name}"] = (
                tensor[None, ..., None] if index else tensor
            )
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": model.config.rank,
        "lora_alpha": model.config.scale.alpha,
        "target_modules": list(model.config.targets),
        "use_rslora": model.config.scale.rule == "alpha/sqrt(r)",
        "use_dora": False,
        "bias": "none",
        **options,
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory
