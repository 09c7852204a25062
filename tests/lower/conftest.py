"""Small random models of every architecture, lowered once a session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from eptc.lower import bind, expected_parameters, trace, write
from eptc.passes.fold_transposes import FoldTransposes
from eptc.passes.stable_names import StableNames
from eptc.tensors import Array, ArrayTensor

_ENCODER = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
# As DeBERTa-v3, but that lengths up to 33 reach beyond its buckets and its farthest position.
_DEBERTA = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_buckets": 8,
    "max_relative_positions": 24,
}
# What other checkpoints of the same class set otherwise.
_DEBERTA_KINDS: dict[str, dict[str, Any]] = {
    "deberta": {},
    "deberta-own-keys": {"share_att_key": False, "type_vocab_size": 2},
    "deberta-no-buckets": {"position_buckets": -1, "norm_rel_ebd": "none"},
    "deberta-to-position": {"pos_att_type": ["c2p"], "position_biased_input": True},
    "deberta-from-position": {"pos_att_type": ["p2c"], "share_att_key": False},
    "deberta-absolute": {"relative_attention": False, "position_biased_input": True},
    "deberta-convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "deberta-narrow-embedding": {"embedding_size": 32, "position_buckets": 7},
}
_T5 = {
    "vocab_size": 70,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 56,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    # Distance 16, the edge of a bucket where a logarithm may fall on either side.
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "decoder_start_token_id": 0,
}
_LLAMA = {
    "vocab_size": 72,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _configuration(name: str) -> tuple[Any, Any]:
    """Return the task class and the configuration of a model by its name here."""
    if name == "bert":
        return BertForSequenceClassification, BertConfig(**_ENCODER, type_vocab_size=2)
    if name == "roberta":
        config = RobertaConfig(**_ENCODER, type_vocab_size=1, pad_token_id=1)
        return RobertaForSequenceClassification, config
    if name in _DEBERTA_KINDS:
        settings = {**_ENCODER, **_DEBERTA, **_DEBERTA_KINDS[name]}
        return DebertaV2ForSequenceClassification, DebertaV2Config(**settings)
    if name == "t5":
        return T5ForConditionalGeneration, T5Config(**_T5)
    if name == "t5-gated-untied":
        gated = T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        return T5ForConditionalGeneration, gated
    if name == "llama-tied":
        return LlamaForCausalLM, LlamaConfig(**_LLAMA, tie_word_embeddings=True)
    assert name == "llama-gqa"
    grouped = LlamaConfig(**_LLAMA, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
    return LlamaForCausalLM, grouped


@dataclasses.dataclass
class Lowered:
    """A PyTorch model, its graphs, and sessions on what was written."""

    config: Any
    reference: Any
    graphs: dict[str, ir.Model]
    directory: Path
    sessions: dict[str, Any]

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def reference_model(name: str) -> Any:
    """Build a model whose outputs are neither degenerate nor exploding."""
    task_class, config = _configuration(name)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task_class(config).eval()
        if name == "t5-gated-untied":
            # Built from a configuration every T5 is tied; T5 v1.1 is not once it is loaded.
            head = torch.randn_like(model.shared.weight) * 0.1
            model.lm_head.weight = torch.nn.Parameter(head)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, ArrayTensor]:
    return {
        name: ArrayTensor(name, parameter.detach().numpy())
        for name, parameter in model.named_parameters()
    }


def lower(config: Any, model: Any, directory: Path) -> Lowered:
    graphs = trace(config)
    weights = weights_of(model)
    expected = expected_parameters(config)
    assert {name: weight.shape for name, weight in weights.items()} == expected
    bind(graphs, weights)
    for graph in graphs.values():
        FoldTransposes()(graph)
        StableNames()(graph)
    write(graphs, directory)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(
            directory / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for name in graphs
    }
    return Lowered(config, model, graphs, directory, sessions)


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """Lower a model by name, once a session: a trace takes seconds."""
    done: dict[str, Lowered] = {}

    def get(name: str) -> Lowered:
        if name not in done:
            model = reference_model(name)
            done[name] = lower(model.config, model, tmp_path_factory.mktemp(name))
        return done[name]

    return get


@pytest.fixture(scope="session")
def lower_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Any], Lowered]:
    """Lower a loaded model."""
    return lambda config, model: lower(config, model, tmp_path_factory.mktemp("base"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
