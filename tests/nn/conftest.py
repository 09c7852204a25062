"""Tiny models with random weights, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


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
