"""Engines against outputs that the original code recorded, by plain ONNX Runtime sessions.

Also: the folded engine is the base model's own engine with other numbers in it.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers

import eptc
from eptc import lower
from eptc.checkpoint.base import read_base
from eptc.pipeline import graph_passes
from eptc.run_passes import run_graph_passes
from eptc.tensors import as_dtype

# Largest difference that the recorded logits allow; the gated T5's reach 39.
SETS = {"t5-tiny": 5e-5, "t5-topk1": 5e-5, "t5-gated-tiny": 1e-4, "llama-tiny": 5e-5}
CASES = [(name, task) for name in SETS for task in range(8)]


@pytest.fixture(scope="module")
def bundle(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, int, eptc.Bundle, Any]:
    name, task = request.param
    folder = golden / "ept" / name
    meta = json.loads((folder / "meta.json").read_text())
    built = eptc.export(
        folder / "adapter",
        base=folder / "base",
        task=task,
        tasks=meta["tasks"],
        top_k=meta["moe_top_k"],
        out=tmp_path_factory.mktemp("engines") / f"{name}-{task}",
        verify=False,
    )
    return name, task, built, np.load(folder / "golden" / f"task{task}.npz")


def session(bundle: eptc.Bundle, graph: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(bundle.path / f"{graph}.onnx"), options, providers=["CPUExecutionProvider"]
    )


def run(bundle: eptc.Bundle, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
    opened = session(bundle, graph)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feeds), strict=True))


def empty_past(bundle: eptc.Bundle, graph: str, batch: int) -> dict[str, Any]:
    return {
        i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session(bundle, graph).get_inputs()
        if i.name.startswith("past_key_values.")
    }


def t5_outputs(bundle: eptc.Bundle, want: Any) -> tuple[Any, Any]:
    """Return encoder state and logits for the recorded inputs."""
    mask = want["attention_mask"]
    encoded = run(bundle, "encoder", {"input_ids": want["input_ids"], "attention_mask": mask})
    cross = {n.replace("present", "past_key_values"): v for n, v in encoded.items() if "." in n}
    feeds = {
        **empty_past(bundle, "decoder", len(mask)),
        **cross,
        "input_ids": want["decoder_input_ids"],
        "encoder_attention_mask": mask,
    }
    return encoded["last_hidden_state"], run(bundle, "decoder", feeds)["logits"]


def llama_logits(bundle: eptc.Bundle, want: Any) -> Any:
    mask = want["attention_mask"]
    feeds = {
        **empty_past(bundle, "model", len(mask)),
        "input_ids": want["input_ids"],
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    return run(bundle, "model", feeds)["logits"]


@pytest.mark.parametrize("bundle", CASES, indirect=True, ids=str)
def test_equals_the_original(bundle: tuple[str, int, eptc.Bundle, Any]) -> None:
    """Logits within the bound of the set, greedy tokens exact."""
    name, _, built, want = bundle
    bound = SETS[name]
    valid = want["attention_mask"].astype(bool)
    if name == "llama-tiny":
        logits = llama_logits(built, want)
        np.testing.assert_allclose(logits[valid], want["logits"][valid], rtol=0, atol=bound)
    else:
        state, logits = t5_outputs(built, want)
        np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=bound)
        recorded = want["encoder_last_hidden_state"][valid]
        np.testing.assert_allclose(state[valid], recorded, rtol=0, atol=2e-5)
    with built.load(providers=["cpu"], threads=1) as engine:
        feeds = {key: want[key] for key in ("input_ids", "attention_mask")}
        rows = engine.generate_ids(feeds)
    start = want["input_ids"].shape[1] if name == "llama-tiny" else 1
    stops = built.manifest.generation.eos_token_id if built.manifest.generation else ()
    for row, tokens in zip(want["generated"][:, start:].tolist(), rows, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        assert tokens == row[:end]


@pytest.mark.parametrize("bundle", [(name, 6) for name in SETS], indirect=True, ids=str)
def test_tokenizer_gives_the_recorded_ids(bundle: tuple[str, int, eptc.Bundle, Any]) -> None:
    """The bundle's tokenizer, by itself, gives the ids that the original trained on."""
    _, _, built, want = bundle
    tokenizer = tokenizers.Tokenizer.from_file(str(built.path / "tokenizer.json"))
    for text, ids, mask in zip(
        want["prompts"], want["input_ids"], want["attention_mask"], strict=True
    ):
        assert tokenizer.encode(str(text)).ids == ids[mask.astype(bool)].tolist()


@pytest.mark.parametrize("bundle", [(name, 6) for name in SETS], indirect=True, ids=str)
def test_same_nodes_as_the_base(
    bundle: tuple[str, int, eptc.Bundle, Any], golden: Path, tmp_path: Path
) -> None:
    """The adapters cost nothing: the base model's own engine has the same operators."""
    from transformers import AutoConfig

    name, _, built, _ = bundle
    base = read_base(golden / "ept" / name / "base")
    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    graphs = lower.trace(config, tied_head=base.tied_head)
    lower.bind(graphs, {n: as_dtype(t, "float32") for n, t in base.weights.items()})
    run_graph_passes(graphs, graph_passes())
    lower.write(graphs, tmp_path)
    for key in graphs:
        own, folded = (
            onnx.load(folder / f"{key}.onnx", load_external_data=False).graph
            for folder in (tmp_path, built.path)
        )
        assert operators(own) == operators(folded)
        assert [i.name for i in own.initializer] == [i.name for i in folded.initializer]
    sizes = {(folder / "weights.bin").stat().st_size for folder in (tmp_path, built.path)}
    assert len(sizes) == 1


def operators(graph: onnx.GraphProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in graph.node)
