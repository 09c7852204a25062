"""Both int8 passes on whole models: what is stored, how large it is, how far answers move."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import pytest

from eptc import lower
from eptc.lower.quantizable import quantizable, quantized_inputs
from eptc.pass_base import GraphPass
from eptc.passes.pack_projections import PackProjections
from eptc.passes.quantize_int8_dynamic import QuantizeInt8Dynamic
from eptc.passes.quantize_int8_static import QuantizeInt8Static
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes, run_graph_passes
from eptc.precision import OptimizeFor
from eptc.tensors import ArrayTensor

Graphs = dict[str, onnx_ir.Model]
Arrays = dict[str, npt.NDArray[Any]]

IDS = np.random.default_rng(1).integers(3, 80, size=(2, 5))
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
MODELS = ["bert", "t5", "gated-t5", "llama", "tied-llama"]


def config(name: str) -> Any:
    from transformers import BertConfig, LlamaConfig, T5Config

    encoder = {
        "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "num_labels": 3, "max_position_embeddings": 64,
    }  # fmt: skip
    t5 = {"vocab_size": 80, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    if name == "bert":
        return BertConfig(**encoder)
    if name == "t5":
        return T5Config(**t5)
    if name == "gated-t5":
        return T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return LlamaConfig(**encoder, tie_word_embeddings=name == "tied-llama")


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Graphs without weights, and weights, by model: made once."""
    return {}


def exact(traced: dict[str, Any], name: str, provider: OptimizeFor = "cpu") -> Graphs:
    """Return the graphs of the exact engine, with random weights."""
    if name not in traced:
        shape = config(name)
        rng = np.random.default_rng(0)
        weights = {
            key: ArrayTensor(key, rng.normal(size=size, scale=0.2).astype(np.float32))
            for key, size in lower.expected_parameters(shape).items()
        }
        traced[name] = lower.trace(shape), weights
    skeleton, weights = traced[name]
    graphs = {key: model.clone() for key, model in skeleton.items()}
    lower.bind(graphs, weights)
    run_graph_passes(graphs, graph_passes(provider))
    return graphs


def feeds(graph: onnx_ir.Graph, cache: Arrays) -> Arrays:
    """Return inputs of a first step."""
    found: Arrays = {}
    for value in graph.inputs:
        name = str(value.name)
        if name in cache:
            found[name] = cache[name]
        elif name.startswith("past_"):
            assert value.shape is not None
            heads, width = (size for size in value.shape if isinstance(size, int))
            found[name] = np.zeros((2, heads, 0, width), np.float32)
        else:
            found[name] = {
                "input_ids": IDS, "token_type_ids": IDS % 2, "attention_mask": MASK,
                "encoder_attention_mask": MASK, "position_ids": np.tile(np.arange(5), (2, 1)),
            }[name]  # fmt: skip
    return found


def run(graphs: Graphs, folder: Path, taps: dict[str, list[str]] | None = None) -> Arrays:
    """Return everything a model puts out, and values in between that are asked for."""
    for key, names in (taps or {}).items():
        values = onnx_ir.convenience.create_value_mapping(graphs[key].graph)
        graphs[key].graph.outputs.extend(values[name] for name in names)
    folder.mkdir()
    lower.write(graphs, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found: Arrays = {}
    cache: Arrays = {}
    for key, model in graphs.items():
        session = onnxruntime.InferenceSession(
            str(folder / f"{key}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        made = dict(zip(names, session.run(names, feeds(model.graph, cache)), strict=True))
        cache |= {name.replace("present.", "past_key_values."): a for name, a in made.items()}
        found |= {f"{key}:{name}": array for name, array in made.items()}
    return found


def ranges(traced: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return the ranges of what is multiplied, by graph, as the exact engine computes it."""
    graphs = exact(traced, name)
    taps = {key: quantized_inputs(model.graph) for key, model in graphs.items()}
    new = {
        key: [n for n in names if n not in {o.name for o in graphs[key].graph.outputs}]
        for key, names in taps.items()
    }
    found = run(graphs, folder, new)
    return {
        key: {n: (found[f"{key}:{n}"].min(), found[f"{key}:{n}"].max()) for n in names}
        for key, names in taps.items()
    }


def steps(traced: dict[str, Any], name: str, kind: str, folder: Path) -> list[Any]:
    if kind == "dynamic":
        return [QuantizeInt8Dynamic(), StableNames()]
    if kind == "packed":
        return [PackProjections(), QuantizeInt8Dynamic(), StableNames()]
    by_graph: dict[str, GraphPass] = {
        key: QuantizeInt8Static(found, symmetric=kind == "symmetric")
        for key, found in ranges(traced, name, folder).items()
    }
    return [by_graph, StableNames()]


@pytest.mark.parametrize("kind", ["dynamic", "packed", "static", "symmetric"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str, kind: str, traced: dict[str, Any], tmp_path: Path) -> None:
    """The answers of the exact engine but for noise, a quarter of its bytes, the same bytes again.

    Each product adds noise of about one part in 127 of its operands, in no common direction:
    a few dozen of them leave a cosine near 1, and one wrong scale or weight does not.
    """
    plain = exact(traced, name)
    large = {
        str(site.weight.name): (site.axis, site.weight.const_value.numpy())
        for model in plain.values()
        for site in quantizable(model.graph)
        if site.weight.const_value is not None
    }
    want = run(plain, tmp_path / "exact")
    passes = steps(traced, name, kind, tmp_path / "taps")
    digests = []
    for attempt in ("first", "second"):
        graphs = exact(traced, name)
        run_graph_passes(graphs, passes)
        got = run(graphs, tmp_path / attempt)
        digests.append([
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((tmp_path / attempt).iterdir())
        ])  # fmt: skip
    assert digests[0] == digests[1]
    assert got.keys() == want.keys()
    for key, array in want.items():
        found = got[key]
        assert found.shape == array.shape
        assert np.isfinite(found).all()
        flat, moved = array.ravel().astype(float), found.ravel().astype(float)
        assert flat @ moved > 0.99 * np.linalg.norm(flat) * np.linalg.norm(moved), key
    stored = {n: v for model in graphs.values() for n, v in model.graph.initializers.items()}
    floats = sum(
        value.const_value.nbytes
        for value in stored.values()
        if value.const_value is not None and value.dtype == onnx_ir.DataType.FLOAT
    )
    whole = {n: v for n, v in stored.items() if v.dtype == onnx_ir.DataType.INT8 and v.shape}
    names = {part for name in whole for part in name.split("+")}
    assert names == large.keys()
    assert sum(v.const_value.nbytes for v in whole.values() if v.const_value is not None) == sum(
        array.size for _, array in large.values()
    )
    assert floats < 0.5 * sum(array.nbytes for _, array in large.values())
    for weight, value in whole.items():
        if weight not in large:
            continue
        axis, array = large[weight]
        scale = stored[f"{weight}@scale"].const_value
        assert value.const_value is not None
        assert scale is not None
        step = np.expand_dims(scale.numpy().astype(np.float64), 1 - axis)
        assert (np.abs(value.const_value.numpy() * step - array) <= step * 0.500001).all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_tied_table_is_stored_once(kind: str, traced: dict[str, Any], tmp_path: Path) -> None:
    """Encoder and decoder of T5 gather it, the head multiplies by it: one piece of the file."""
    graphs = exact(traced, "t5")
    run_graph_passes(graphs, steps(traced, "t5", kind, tmp_path / "taps"))
    folder = tmp_path / "out"
    folder.mkdir()
    lower.write(graphs, folder)
    table = graphs["encoder"].graph.initializers["shared.weight"].const_value
    assert table is not None
    content = (folder / "weights.bin").read_bytes()
    assert content.count(table.numpy().tobytes()) == 1
    assert graphs["decoder"].graph.initializers["shared.weight"].dtype == onnx_ir.DataType.INT8
    bias = [n for n in graphs["encoder"].graph.initializers if "relative_attention_bias" in n]
    assert [graphs["encoder"].graph.initializers[n].dtype for n in bias] == [
        onnx_ir.DataType.FLOAT
    ]
