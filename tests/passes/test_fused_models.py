"""Each list of graph passes on whole models: the same numbers as with standard operators."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import pytest

from eptc import lower
from eptc.pipeline import graph_passes, run_graph_passes
from eptc.precision import OptimizeFor
from eptc.tensors import ArrayTensor

Arrays = dict[str, npt.NDArray[Any]]

# Rows of a mask [2, 5]: holes, one key alone; then left padding.
HOLES = np.array([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
LEFT = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])

# What each provider's kernels make of one layer.
FUSED: dict[tuple[str, OptimizeFor], dict[str, int]] = {
    ("bert", "cpu"): {"MultiHeadAttention": 0},
    ("bert", "cuda"): {"MultiHeadAttention": 2},
    ("roberta", "cuda"): {"MultiHeadAttention": 2},
    ("t5", "cpu"): {"MultiHeadAttention": 4},
    ("t5", "cuda"): {"MultiHeadAttention": 6},
    ("gated-t5", "cuda"): {"MultiHeadAttention": 6},
    ("llama", "cpu"): {"RotaryEmbedding": 4, "MultiHeadAttention": 2},
    ("llama", "cuda"): {"RotaryEmbedding": 4, "MultiHeadAttention": 2},
    ("grouped-llama", "cpu"): {"RotaryEmbedding": 4, "MultiHeadAttention": 0},
    ("grouped-llama", "cuda"): {"RotaryEmbedding": 4, "MultiHeadAttention": 0},
}


def config(name: str) -> Any:
    from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config

    encoder = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "num_labels": 3,
    }  # fmt: skip
    t5 = {"vocab_size": 40, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    if name == "bert":
        return BertConfig(**encoder)
    if name == "roberta":
        return RobertaConfig(**encoder)
    if name == "t5":
        return T5Config(**t5)
    if name == "gated-t5":
        return T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    groups = 2 if name == "grouped-llama" else 4
    return LlamaConfig(**encoder, num_key_value_heads=groups, max_position_embeddings=64)


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Graphs without weights, and weights, by model: made once."""
    return {}


def graphs(traced: dict[str, Any], name: str) -> dict[str, onnx_ir.Model]:
    """Return bound graphs of a model with random weights."""
    if name not in traced:
        shape = config(name)
        rng = np.random.default_rng(0)
        weights = {
            key: ArrayTensor(key, rng.normal(size=size, scale=0.3).astype(np.float32))
            for key, size in lower.expected_parameters(shape).items()
        }
        traced[name] = lower.trace(shape), weights
    skeleton, weights = traced[name]
    bound = {key: model.clone() for key, model in skeleton.items()}
    lower.bind(bound, weights)
    return bound


class Engine:
    """Plain sessions on the graphs that a list of passes makes."""

    def __init__(self, bound: dict[str, onnx_ir.Model], wanted: OptimizeFor, folder: Path) -> None:
        folder.mkdir()
        run_graph_passes(bound, graph_passes(wanted))
        lower.write(bound, folder)
        self.operators = collections.Counter(
            node.op_type for model in bound.values() for node in model.graph
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            key: onnxruntime.InferenceSession(
                str(folder / f"{key}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for key in bound
        }

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        session = self.sessions[graph]
        for spec in session.get_inputs():
            if spec.name.startswith("past_") and spec.name not in feeds:
                shape = (len(feeds["input_ids"]), spec.shape[1], 0, spec.shape[3])
                feeds = {**feeds, spec.name: np.zeros(shape, np.float32)}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


def past(outputs: Arrays) -> Arrays:
    return {n.replace("present.", "past_key_values."): v for n, v in outputs.items() if "." in n}


def outputs(engine: Engine, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Arrays:
    """Run everything a model has, decoders in two steps; rows nobody reads are left out."""
    masked = {"input_ids": ids, "attention_mask": mask}
    if "encoder" in engine.sessions:
        encoded = engine.run("encoder", masked)
        found = dict(encoded)
        cache = past(encoded)
        for step, written in enumerate((ids[:, :3], ids[:, 3:4], ids[:, 1:])):
            feeds = {"input_ids": written, "encoder_attention_mask": mask, **cache}
            made = engine.run("decoder", feeds)
            cache |= past(made)
            found |= {f"{step}.{name}": value for name, value in made.items()}
        return found
    if "position_ids" not in [spec.name for spec in engine.sessions["model"].get_inputs()]:
        if len(engine.sessions["model"].get_inputs()) > 2:
            masked["token_type_ids"] = ids % 2
        return engine.run("model", masked)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    found, cache = {}, {}
    for start, end in ((0, 3), (3, 4), (4, 5)):
        part = slice(start, end)
        feeds = {
            "input_ids": ids[:, part],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, part],
            **cache,
        }
        made = engine.run("model", feeds)
        cache = past(made)
        found[f"{start}.logits"] = made["logits"][mask[:, part].astype(bool)]
    return found


@pytest.mark.parametrize(("name", "provider"), FUSED)
def test_equals_standard_operators(
    name: str, provider: OptimizeFor, traced: dict[str, Any], tmp_path: Path
) -> None:
    """Holes in masks, left padding, no past and some, one token and several, batch 1 and 2."""
    plain = Engine(graphs(traced, name), "any", tmp_path / "any")
    fused = Engine(graphs(traced, name), provider, tmp_path / provider)
    assert not any("Attention" in op for op in plain.operators)
    counted = {op: fused.operators[op] for op in FUSED[name, provider]}
    assert counted == FUSED[name, provider]
    ids = np.random.default_rng(1).integers(3, 40, size=(2, 5))
    for mask in (HOLES, LEFT):
        for rows in (slice(0, 2), slice(1, 2)):
            want = outputs(plain, ids[rows], mask[rows])
            got = outputs(fused, ids[rows], mask[rows])
            assert got.keys() == want.keys()
            for key, array in want.items():
                bound = 1e-5 * float(np.abs(array).max(initial=0))
                np.testing.assert_allclose(got[key], array, rtol=0, atol=bound, err_msg=key)
