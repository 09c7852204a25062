"""Tracing: clean graphs, no weights, no side effects, the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import BertConfig, DebertaV2Config, LlamaConfig, T5Config

from eptc.errors import BaseModelError
from eptc.lower import expected_parameters, trace

ALL = ["bert", "roberta", "deberta", "t5", "t5-gated-untied", "llama-tied", "llama-gqa"]

# Two layers (T5: three in the encoder). A rise means that noise came back into the graphs.
NODES = {
    ("bert", "model"): 77,
    ("roberta", "model"): 82,
    ("deberta", "model"): 118,
    ("t5", "encoder"): 133,
    ("t5", "decoder"): 141,
    ("t5-gated-untied", "encoder"): 139,
    ("t5-gated-untied", "decoder"): 143,
    ("llama-tied", "model"): 141,
    ("llama-gqa", "model"): 147,
}
# GatherElements does not broadcast its index: DeBERTa's is repeated once, for all layers.
EXPANDS = {("deberta", "model"): 1}
# One hidden layer each: what matters is that nothing else is in the way.
SCRIPT = """
import sys, tempfile
from pathlib import Path
import numpy as np
from transformers import LlamaConfig, T5Config
from eptc.lower import bind, expected_parameters, trace, write
from eptc.passes.stable_names import StableNames
from eptc.tensors import ArrayTensor

CONFIGS = {
    "t5": T5Config(vocab_size=20, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2),
    "llama": LlamaConfig(vocab_size=20, hidden_size=24, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1),
}
for name in sys.argv[1:]:
    config = CONFIGS[name]
    graphs = trace(config)
    shapes = expected_parameters(config)
    bind(graphs, {n: ArrayTensor(n, np.full(s, len(n), np.float32)) for n, s in shapes.items()})
    for graph in graphs.values():
        StableNames()(graph)
    with tempfile.TemporaryDirectory() as folder:
        for file, digest in write(graphs, Path(folder)).items():
            print(name, file, digest)
"""


@pytest.mark.parametrize("name", ALL)
def test_graphs_are_valid_and_clean(lowered: Callable[[str], Any], name: str) -> None:
    model = lowered(name)
    for graph_name, graph in model.graphs.items():
        path = model.directory / f"{graph_name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        operators = Counter(node.op_type for node in graph.graph)
        assert {node.domain for node in graph.graph} == {""}
        assert not operators.keys() & {"If", "Loop", "Identity", "CastLike", "Constant"}
        assert operators["Expand"] == EXPANDS.get((name, graph_name), 0)
        assert dict(graph.opset_imports) == {"": 20}
        assert operators.total() <= NODES[name, graph_name]
        assert not graph.functions


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_used(lowered: Callable[[str], Any], name: str) -> None:
    """No weight is left out and none is called anything else."""
    model = lowered(name)
    named = {n for graph in model.graphs.values() for n in graph.graph.initializers}
    parameters = set(dict(model.reference.named_parameters()))
    assert {n for n in named if not n.startswith("constants.")} == parameters


def test_names_say_where_a_node_comes_from(lowered: Callable[[str], Any]) -> None:
    names = [node.name for node in lowered("t5").graphs["decoder"].graph]
    assert len(names) == len(set(names))
    assert "decoder.block.1.layer.1.EncDecAttention.q/MatMul" in names


def run_script(folder: Path, seed: str, *names: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(done.stdout.splitlines())


def test_same_bytes_every_time(tmp_path: Path) -> None:
    """Hash seed, current folder, order and what was traced before make no difference."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    first = run_script(tmp_path, "1", "t5")
    second = run_script(other, "2", "llama", "t5")
    assert len(first) == 3
    assert first == [line for line in second if line.startswith("t5 ")]


def test_leaves_torch_alone() -> None:
    """A caller's random state, default type and grad mode are not touched, nor relied upon."""
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    before_config = config.to_dict()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        graphs = trace(config)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert config.to_dict() == before_config
    assert {str(value.dtype) for value in graphs["model"].graph.initializers.values()} <= {
        "FLOAT",
        "INT64",
    }


def test_weights_stay_away() -> None:
    """A model of 27 GB is described and traced in no memory worth speaking of."""
    config = LlamaConfig(num_hidden_layers=1, vocab_size=32000)
    graphs = trace(config)
    values = graphs["model"].graph.initializers
    assert values["lm_head.weight"].const_value is None
    small = [v.const_value.nbytes for v in values.values() if v.const_value is not None]
    assert max(small) < 4096
    shapes = expected_parameters(LlamaConfig())
    assert shapes["model.layers.31.mlp.down_proj.weight"] == (4096, 11008)


def test_tied_head_can_be_overruled() -> None:
    """T5 v1.1 trained from scratch by transformers 5 is tied, and does not scale."""
    config = T5Config(d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
    assert "lm_head.weight" not in expected_parameters(config)
    assert "lm_head.weight" in expected_parameters(config, tied_head=False)
    unscaled = T5Config(
        d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    assert "lm_head.weight" in expected_parameters(unscaled)
    assert "lm_head.weight" not in expected_parameters(unscaled, tied_head=True)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_refuses_rope_that_depends_on_length(rope: str) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    config.rope_parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(BaseModelError, match=rope):
        trace(config)


def test_refuses_an_encoder_that_is_a_decoder() -> None:
    config = BertConfig(hidden_size=32, num_attention_heads=4, is_decoder=True)
    with pytest.raises(BaseModelError, match="decoder"):
        expected_parameters(config)


@pytest.mark.parametrize("buckets", [1, 40])
def test_refuses_buckets_without_order(buckets: int) -> None:
    config = DebertaV2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        relative_attention=True,
        pos_att_type=["c2p"],
        position_buckets=buckets,
        max_relative_positions=20,
    )
    with pytest.raises(BaseModelError, match=f"{buckets} position buckets"):
        trace(config)
