"""QuantizeInt8Static: what it makes of a graph and its ranges, how far the answers move."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from eptc.errors import OptionError
from eptc.lower.quantizable import quantized_inputs
from eptc.passes.quantize_int8_static import QuantizeInt8Static
from eptc.run_passes import check_graph

# What each graph becomes when ONNX Runtime loads it.
FUSED: dict[str, dict[str, int]] = {
    "bias": {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1},
    "batch dims": {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1},
    "one activation, two weights": {
        "QuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Transpose": 0,
    },
    "two activations, one weight": {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2},
    "Gemm": {},  # ONNX Runtime makes Add and product of two axes a float32 Gemm again.
    "tied": {"Gather": 2, "QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Transpose": 0},
}  # fmt: skip
ONE = "(float[b,s,48] y) { y = MatMul(x, W) }"


@pytest.mark.parametrize("what", FUSED)
def test_quantizes(what: str, small: Any, run_ort: Callable[..., Any]) -> None:
    """Answers within the bound of the steps, from integer kernels; a second run no-op."""
    plain, model, products = small.model(what), small.model(what), small.products(what)
    step = QuantizeInt8Static(small.ranges)
    assert step(model).modified
    check_graph(model)
    assert not step(model).modified
    activations = {product[0] for product in products.values() if product is not None}
    made = [node.op_type for node in model.graph]
    assert made.count("QuantizeLinear") == len(activations)
    feeds = small.given(model)
    want, got = run_ort(plain, feeds), run_ort(model, feeds)
    assert {op: got.operators[op] for op in FUSED[what]} == FUSED[what]
    assert not (FUSED[what] and got.operators["DequantizeLinear"])
    for name, product in products.items():
        moved = np.abs(got.outputs[name] - want.outputs[name])
        assert moved.max() > 0
        assert (moved <= small.bound(product)).all()


def test_cuts_off_what_is_outside(small: Any, run_ort: Callable[..., Any]) -> None:
    """A narrower range is obeyed: the answer is that of the input cut off, within a step."""
    model = small.model("two activations, one weight")
    ends = (-0.5, 0.75)
    QuantizeInt8Static({**small.ranges, "x": ends})(model)
    x = small.feeds["x"]
    cut = np.clip(x, *ends)
    got = run_ort(model, small.given(model))
    weight = small.weights["W"]
    limit = (1.25 / 127) * np.abs(weight).sum(0) + np.abs(cut).sum(-1, keepdims=True) * (
        np.abs(weight).max(0) / 127
    )
    assert (np.abs(got.outputs["y"] - cut @ weight) <= limit).all()
    assert (np.abs(x @ weight - cut @ weight) > 3 * limit).any()


@pytest.mark.parametrize("ends", [(0.0, 0.0), (2.0, 2.0), (-2.0, -2.0), (1.0, 3.0), (-3.0, -1.0)])
def test_degenerate_ranges(
    ends: tuple[float, float], small: Any, run_ort: Callable[..., Any]
) -> None:
    """One value alone, zero alone, ranges without zero: they hold zero and both their ends."""
    model = small.graph(ONE)
    QuantizeInt8Static({"x": ends})(model)
    for value in (*ends, 0.0):
        x = np.full((1, 2, 32), value, np.float32)
        got = run_ort(model, {**small.given(model), "x": x}).outputs["y"]
        weight = small.weights["W"]
        step = np.abs(weight).max(0) / 127
        # The activation by a step of 3 / 127 at most, the weight by half of one.
        limit = abs(value) / 100 * np.abs(weight).sum(0) + abs(value) * 32 * step * 0.51
        assert (np.abs(got - x @ weight) <= limit).all()


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.inf), (1.0, -1.0)])
def test_refuses_ranges(bad: tuple[float, float], small: Any) -> None:
    model = small.graph(ONE)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(OptionError, match="the range of x is"):
        QuantizeInt8Static({"x": bad})(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_leaves_what_has_no_range(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Equal to the byte, with the reason; other weights are quantized all the same."""
    model = small.model("two activations, one weight")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_int8_static"):
        step = QuantizeInt8Static({"x": small.ranges["x"]})
        assert not step(model).modified
    assert step.plan(model)["W"] == "z has no range"
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert any("left W alone: z has no range" in r.getMessage() for r in caplog.records)
    body = "(float[b,s,48] y, float[b,48] w) { y = MatMul(x, W) w = Gemm <transB = 1> (f, V) }"
    model = small.graph(body)
    assert QuantizeInt8Static({"f": small.ranges["f"], "unheard": (0, 1)})(model).modified
    types = {name: model.graph.initializers[name].dtype for name in ("W", "V")}
    assert types == {"W": ir.DataType.FLOAT, "V": ir.DataType.INT8}


@pytest.mark.parametrize("what", FUSED)
def test_its_ranges_are_those_that_are_asked_for(what: str, small: Any) -> None:
    """With a range for each of `quantized_inputs` all is quantized; without any one, not all."""
    names = quantized_inputs(small.model(what).graph)
    for missing in (None, *names):
        model = small.model(what)
        QuantizeInt8Static({n: small.ranges[n] for n in names if n != missing})(model)
        kept = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
        assert any(len(v.shape or ()) == 2 for v in kept) is (missing is not None)


def test_options_are_short() -> None:
    """Of the ranges a number and a digest, which any order gives and any other number changes."""
    ranges = {"b/MatMul": (-1.5, 0.1), "a/MatMul": (0.0, 3.0)}
    step = QuantizeInt8Static(ranges, keep=("W",))
    text = '[["a/MatMul",0.0,3.0],["b/MatMul",-1.5,0.1]]'
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert step.options() == {
        "ranges": {"count": 2, "sha256": digest},
        "keep": ["W"],
        "only": None,
        "reduce_range": False,
    }
    assert (
        QuantizeInt8Static(dict(reversed(ranges.items()))).options()["ranges"]["sha256"] == digest
    )
    moved = {**ranges, "a/MatMul": (0.0, 3.0000001)}
    assert QuantizeInt8Static(moved).options()["ranges"]["sha256"] != digest
    assert json.loads(json.dumps(step.options())) == step.options()
    assert "MatMul" not in repr(step)
