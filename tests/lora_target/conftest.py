"""What tests of `--target lora` share: bases, native checkpoints, adapters that are spoiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from eptc.interop import lora
from eptc.interop.lora_files import write_adapter
from eptc.nn import EptConfig, EptModel, load_base, load_reference
from eptc.tasks import Task

PEFT_WARNINGS = [
    # PEFT asks transformers by an older name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It asks a T5 v1.1's configuration, which calls every model tied.
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]
WEIGHTS, CONFIG, PROVENANCE = "adapter_model.safetensors", "adapter_config.json", "eptc.json"


def load(base: Path, **options: Any) -> Any:
    """Return a base as transformers loads it for its task."""
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(base)
    auto = {
        "t5": transformers.AutoModelForSeq2SeqLM, "llama": transformers.AutoModelForCausalLM,
    }.get(config.model_type, transformers.AutoModelForSequenceClassification)  # fmt: skip
    return auto.from_pretrained(base, dtype=torch.float32, **options).eval()


def ask(model: Any, seed: int = 0) -> Any:
    """Return a model's logits on seeded tokens, some of them padding."""
    drawn = np.random.default_rng(seed)
    ids = torch.from_numpy(drawn.integers(3, 30, (3, 11)))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.from_numpy(drawn.integers(3, 30, (3, 5)))
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def agree(found: Any, want: Any) -> None:
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shape(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 50, "max_position_embeddings": 64, "initializer_range": 0.3, **more,
    }  # fmt: skip


CLASSES = (
    Task("tone", "classification", labels=("bad", "good", "neither"), aliases=("mood",)),
    Task("topic", "classification", labels=("a", "b", "c")),
    Task("score", "regression"),
)
TEXTS = tuple(Task(name, "text-to-text", labels=("no", "yes")) for name in ("tone", "topic"))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=10, d_ff=50, num_layers=2, num_heads=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


BASES: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[Task, ...], tuple[str, ...]]] = {
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**shape())),
        ("query", "value", "intermediate.dense", "output.dense"), CLASSES, ("bert.pooler",),
    ),
    "roberta": (
        lambda: transformers.RobertaModel(
            transformers.RobertaConfig(**shape(pad_token_id=1)), add_pooling_layer=False
        ),
        ("query", "output.dense"), CLASSES, (),
    ),
    "deberta": (
        lambda: transformers.DebertaV2Model(
            transformers.DebertaV2Config(
                **shape(), relative_attention=True, position_biased_input=False,
                pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
                position_buckets=8,
            )
        ),
        ("query_proj", "intermediate.dense"), CLASSES, ("pooler",),
    ),
    "t5": (t5, ("q", "v", "wi", "wo"), TEXTS, ()),
    "llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape(num_key_value_heads=1))
        ),
        ("q_proj", "down_proj"), TEXTS, ()
    ),
}  # fmt: skip


@pytest.fixture
def native(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a native checkpoint and its base, and gives their folders."""

    def write(
        kind: str = "bert", variant: Any = "paper", change: Any = lambda _: None
    ) -> tuple[Path, Path]:
        build, targets, tasks, heads = BASES[kind]
        ckpt, base = tmp_path / "in" / "ckpt", tmp_path / "in" / "base"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build().save_pretrained(base)
            model = EptModel.attach(
                load_base(base, allow_missing=heads),
                EptConfig(
                    variant=variant, targets=targets, kernel_sizes=(2, 3, 4, 5), top_k=2, rank=3,
                    tasks=tasks,
                ),
                head_modules=heads,
            )  # fmt: skip
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            with torch.no_grad():
                change(model)
            model.save(ckpt, base_dir=base, base_name="small")
        return ckpt, base

    return write


def answers(ckpt: Path, base: Path, task: str) -> Any:
    """Return the unfolded model's logits for a task."""
    reference = load_reference(ckpt, base)
    with reference.task(task):
        return ask(reference.hf)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has every adapter spoiled after it was written."""

    def plant(fault: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        def spoiled(directory: Path, *arguments: Any) -> int:
            rank = write_adapter(directory, *arguments)
            tensors = dict(safetensors.numpy.load_file(directory / WEIGHTS))
            config = json.loads((directory / CONFIG).read_text())
            fault(tensors, config)
            tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
            safetensors.numpy.save_file(tensors, directory / WEIGHTS)
            (directory / CONFIG).write_text(json.dumps(config))
            return rank

        monkeypatch.setattr(lora, "write_adapter", spoiled)

    return plant
