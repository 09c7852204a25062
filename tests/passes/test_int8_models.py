"""Both int8 passes: what they share; whole models, what is stored, how far answers move."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from eptc import lower
from eptc.lower.quantizable import quantizable, quantized_inputs
from eptc.lower.weights import WeightTensor
from eptc.pass_base import GraphPass, LossyPass
from eptc.passes.pack_projections import PackProjections
from eptc.passes.quantize_int8_dynamic import QuantizeInt8Dynamic
from eptc.passes.quantize_int8_static import QuantizeInt8Static
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes
from eptc.run_passes import check_graph, run_graph_passes

MODELS = ["bert", "t5", "gated-t5", "llama", "tied-llama"]
PASSES: dict[str, Callable[..., LossyPass]] = {
    "dynamic": lambda _, **options: QuantizeInt8Dynamic(**options),
    "static": lambda ranges, **options: QuantizeInt8Static(ranges, **options),
}


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"keep": ("W",)}, {"V"}),
        ({"only": ("W",)}, {"W"}),
        ({"reduce_range": True}, {"W", "V"}),
    ],
    # A set's own text depends on the process.
    ids=["keep", "only", "reduce-range"],
)
def test_options(kind: str, options: dict[str, Any], whole: set[str], small: Any) -> None:
    """Which weights become integers, of which size, and why the others do not."""
    model = small.model("one activation, two weights")
    step = PASSES[kind](small.ranges, **options)
    assert step.plan(model).keys() == {"W", "V", "b"} - whole
    step(model)
    stored = {name: model.graph.initializers[name] for name in "WV"}
    assert {n for n, v in stored.items() if v.dtype == onnx_ir.DataType.INT8} == whole
    for name in whole:
        tensor = stored[name].const_value
        assert tensor is not None
        assert np.abs(tensor.numpy()).max() == (64 if "reduce_range" in options else 127)


@pytest.mark.parametrize("kind", PASSES)
def test_a_chain(kind: str, small: Any, run_ort: Callable[..., Any]) -> None:
    """What one product makes is what another multiplies, and so are a table's rows."""
    plain, model = small.model("a chain"), small.model("a chain")
    assert PASSES[kind](small.ranges)(model).modified
    check_graph(model)
    want, got = (run_ort(m, small.given(m)) for m in (plain, model))
    assert not got.operators["MatMul"]
    # The identity costs half a step of x, once more: twice the bound of one product.
    limit = 2 * small.bound(("x", "W", False))
    assert (np.abs(got.outputs["y"] - want.outputs["y"]) <= limit).all()


@pytest.mark.parametrize("kind", PASSES)
def test_zero_stays_zero(kind: str, small: Any, run_ort: Callable[..., Any]) -> None:
    """The zero point that is taken off is the one that was added.

    One off by a step moves every number by no more than the bound of a product allows.
    """
    model = small.model("batch dims")
    PASSES[kind](small.ranges)(model)
    z = small.feeds["z"].copy()
    z[:, :, 1:] -= 5
    z[:, :, 0] = 0
    y = run_ort(model, {**small.given(model), "z": z}).outputs["y"]
    assert (y[:, :, 0] == 0).all()
    assert y[:, :, 1:].any()


@pytest.mark.parametrize("kind", PASSES)
def test_stays_lazy(kind: str, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.model("tied")
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert PASSES[kind](small.ranges)(model).modified


@pytest.fixture
def exact(whole_model: Any) -> Callable[[str], dict[str, onnx_ir.Model]]:
    """Return a function that gives the graphs of an exact engine."""

    def build(name: str) -> dict[str, onnx_ir.Model]:
        graphs: dict[str, onnx_ir.Model] = whole_model(name)
        run_graph_passes(graphs, graph_passes())
        return graphs

    return build


@pytest.fixture
def steps(exact: Any, first_step: Any, tmp_path: Path) -> Callable[[str, str], list[Any]]:
    """Return a function that gives the passes of one kind for a model."""

    def ranges(name: str) -> dict[str, Any]:
        """Return the ranges of what is multiplied, by graph, as the exact engine computes it."""
        graphs = exact(name)
        taps = {key: quantized_inputs(model.graph) for key, model in graphs.items()}
        new = {
            key: [n for n in names if n not in {o.name for o in graphs[key].graph.outputs}]
            for key, names in taps.items()
        }
        found = first_step(graphs, tmp_path / "taps", new)
        return {
            key: {n: (found[f"{key}:{n}"].min(), found[f"{key}:{n}"].max()) for n in names}
            for key, names in taps.items()
        }

    def make(name: str, kind: str) -> list[Any]:
        if kind == "dynamic":
            return [QuantizeInt8Dynamic(), StableNames()]
        if kind == "packed":
            return [PackProjections(), QuantizeInt8Dynamic(), StableNames()]
        by_graph: dict[str, GraphPass] = {
            key: QuantizeInt8Static(found) for key, found in ranges(name).items()
        }
        return [by_graph, StableNames()]

    return make


@pytest.mark.parametrize("kind", ["dynamic", "packed", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(
    name: str, kind: str, exact: Any, steps: Any, first_step: Any, tmp_path: Path
) -> None:
    """The answers of the exact engine but for noise, a quarter of its bytes, the same bytes again.

    Each product adds noise of about one part in 127 of its operands, in no common direction:
    a few dozen of them leave a cosine near 1, and one wrong scale or weight does not.
    """
    plain = exact(name)
    large = {
        str(site.weight.name): (site.axis, site.weight.const_value.numpy())
        for model in plain.values()
        for site in quantizable(model.graph)
        if site.weight.const_value is not None
    }
    want = first_step(plain, tmp_path / "exact")
    passes = steps(name, kind)
    digests = []
    for attempt in ("first", "second"):
        graphs = exact(name)
        run_graph_passes(graphs, passes)
        got = first_step(graphs, tmp_path / attempt)
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
def test_a_tied_table_is_stored_once(kind: str, exact: Any, steps: Any, tmp_path: Path) -> None:
    """Encoder and decoder of T5 gather it, the head multiplies by it: one piece of the file."""
    graphs = exact("t5")
    run_graph_passes(graphs, steps("t5", kind))
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
