"""Engines in 16 bits: what range analysis keeps, caches, and who runs them."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from eptc.calibration import observe, simulated
from eptc.errors import BundleError
from eptc.passes.cast_half import CastHalf
from eptc.runtime import Engine, load_manifest

TEXTS = [{"text": "the film was good"}, {"text": "a dull , long and not very quiet film"}]
SENTENCES = [{"sentence": "a warm and funny film"}, {"sentence": "no plot and no end"}]
BLOCK = "bert.encoder.layer.0.intermediate"


def magnitudes(bundle: Path, examples: Any, values: Any) -> dict[str, dict[str, float]]:
    found = observe(bundle, examples, values)
    return {graph: {name: r.magnitude for name, r in d.items()} for graph, d in found.items()}


def logits(bundle: Path) -> Any:
    with Engine.load(bundle) as engine:
        return engine.run(engine.tokenize(TEXTS))["logits"]


def test_planted_overflow(
    classifier: Path,
    tmp_path: Path,
    rewrite: Any,
    halve: Any,
    all_values: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An activation of 1e5 is found and stays float32; without ranges it overflows, and shows."""
    monkeypatch.setenv("EPTC_CACHE_DIR", str(tmp_path / "cache"))

    def plant(graphs: Any) -> None:
        found = graphs["model"].graph.initializers
        bias = found[f"{BLOCK}.dense.bias"]
        large = bias.const_value.numpy().copy()
        large[5] = 1e5
        bias.const_value = onnx_ir.tensor(large, name=bias.name)
        # What the block makes of it is as it was: its column is small.
        weight = found["bert.encoder.layer.0.output.dense.weight"]
        column = weight.const_value.numpy().copy()
        column[5] *= 1e-5
        weight.const_value = onnx_ir.tensor(column, name=weight.name)

    planted = rewrite(classifier, tmp_path / "planted", plant)
    values = all_values(planted)
    ranges = magnitudes(planted, TEXTS, values)
    far = [name for name, magnitude in ranges["model"].items() if 9e4 < magnitude < 2e5]
    assert far == [f"{BLOCK}.dense/Add", f"{BLOCK}.intermediate_act_fn/Gelu"]

    graph = onnx_ir.load(planted / "model.onnx")
    plan = CastHalf(ranges=ranges["model"]).plan(graph)
    assert {*far, "bert.encoder.layer.0.output.dense/MatMul"} <= set(plan)
    assert "reaches 1e+05; 8 times that is beyond 65504" in plan[far[1]]

    want = logits(planted)
    halve(planted, tmp_path / "careful", ranges=ranges)
    halve(planted, tmp_path / "careless")
    for name in ("careful", "careless"):
        simulated(tmp_path / name, tmp_path / f"{name}-twin")
    assert np.abs(logits(tmp_path / "careful-twin") - want).max() < 5e-3 * np.abs(want).max()
    assert not np.isfinite(logits(tmp_path / "careless-twin")).all()


def test_cpu_runs_float16_and_refuses_bfloat16(
    classifier: Path, tmp_path: Path, halve: Any
) -> None:
    want = logits(classifier)
    half = halve(classifier, tmp_path / "float16")
    assert np.abs(logits(half) - want).max() < 4e-3 * np.abs(want).max()
    brain = halve(classifier, tmp_path / "bfloat16", "bfloat16")
    with pytest.raises(BundleError, match="Could not find an implementation"):
        Engine.load(brain, providers=["cpu"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_writers(
    writer: Path,
    tmp_path: Path,
    halve: Any,
    all_values: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """The cache is 16 bits wide and nothing else of the interface; the twin writes the same."""
    monkeypatch.setenv("EPTC_CACHE_DIR", str(tmp_path / "cache"))
    ranges = magnitudes(writer, SENTENCES, all_values(writer))
    half = halve(writer, tmp_path / "half", dtype, ranges)
    for graph in load_manifest(half).graphs.values():
        for tensor in (*graph.inputs, *graph.outputs):
            cached = tensor.name.startswith(("past_key_values.", "present."))
            assert (tensor.dtype == dtype) is cached, tensor
    simulated(half, tmp_path / "twin")
    with Engine.load(writer) as exact, Engine.load(tmp_path / "twin") as twin:
        feeds = exact.tokenize(SENTENCES)
        feeds = {name: feeds[name] for name in ("input_ids", "attention_mask")}
        want = exact.generate_ids(feeds, 6)
        if dtype == "float16":  # in bfloat16 a token may go either way
            assert twin.generate_ids(feeds, 6) == want
        classes = exact.classify(SENTENCES)
        bound = {"float16": 0.01, "bfloat16": 0.1}[dtype]
        for one, other in zip(classes, twin.classify(SENTENCES), strict=True):
            assert other.label == one.label
            assert other.probabilities == pytest.approx(one.probabilities, abs=bound)
    if dtype == "float16":  # the cache stays inside ONNX Runtime, in 16 bits
        with Engine.load(half, providers=["cpu"]) as engine:
            assert engine.generate_ids(feeds, 6) == want
            assert [c.label for c in engine.classify(SENTENCES)] == [c.label for c in classes]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_of_whole_models(writer: Path, tmp_path: Path, halve: Any, dtype: str) -> None:
    """Each value at most once, and no more of them than norms and heads need."""
    half = halve(writer, tmp_path / "half", dtype)
    for spec in load_manifest(half).graphs.values():
        graph = onnx_ir.load(half / spec.file).graph
        casts = [node for node in graph if node.op_type == "Cast"]
        read = collections.Counter(node.inputs[0] for node in casts)
        assert set(read.values()) == {1}
        norms = sum(node.op_type == "ReduceMean" for node in graph)
        products = sum(node.op_type in ("MatMul", "MultiHeadAttention") for node in graph)
        assert 0 < len(casts) <= 3 * norms + 6 < products + 3 * norms
