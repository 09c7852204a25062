"""QuantizeQdq: what it makes of a graph and its ranges, how far the answers move."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.errors import InternalError, OptionError
from eptc.lower import write
from eptc.lower.explicit_quantization import check_explicit
from eptc.lower.weights import WeightTensor
from eptc.passes.quantize_qdq import QuantizeQdq
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes
from eptc.run_passes import Step, check_graph, run_graph_passes

NUMBERS: list[Any] = ["int8", "fp8"]
DTYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
# Each with how many activations are rounded.
PRODUCTS = {
    "bias": 1, "batch dims": 1, "one activation, two weights": 1,
    "two activations, one weight": 2, "Gemm": 1, "Gemm without bias": 1,
}  # fmt: skip
MODELS = ["bert", "t5", "gated-t5", "llama", "tied-llama"]
ONE = "(float[b,s,48] y) { y = MatMul(x, W) }"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a graph as it is written: ONNX Runtime mistakes fp8 for int8."""

    def outputs(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write({"model": model}, folder)
        return opened(folder / "model.onnx")(feeds)

    return outputs


def opened(path: Path) -> Callable[..., dict[str, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def bound(small: Any, number: str, product: tuple[str, str, bool]) -> Any:
    """Return how far each output may move."""
    if number == "int8":
        return small.bound(product, symmetric=True)
    x, weight = small.feeds[product[0]], small.weights[product[1]]
    x, weight = np.abs(x), np.abs(weight.T if product[2] else weight)
    # A sixteenth of each factor, or half of the smallest step.
    off_x = np.maximum(x / 16, x.max() / 448 / 1024)
    off_w = np.maximum(weight / 16, weight.max() / 448 / 1024)
    return off_x @ (weight + off_w) + x @ off_w + 2.0**-20 * (x @ weight + 10)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("what", PRODUCTS)
def test_quantizes(what: str, number: Any, small: Any, run: Any) -> None:
    """Answers within the bound of the type, by TensorRT's rules; a second run no-op."""
    plain, model, products = small.model(what), small.model(what), small.products(what)
    step = QuantizeQdq(small.ranges, number)
    assert step(model).modified
    check_graph(model)
    check_explicit(model.graph)
    assert not step(model).modified
    made = [node.op_type for node in model.graph]
    assert made.count("QuantizeLinear") == PRODUCTS[what]
    assert {node.domain for node in model.graph} == {""}
    feeds = small.given(model)
    want, got = run(plain, feeds), run(model, feeds)
    for name, product in products.items():
        moved = np.abs(got[name] - want[name])
        assert moved.max() > 0
        assert (moved <= bound(small, number, product)).all()


def test_weights_in_another_order_than_their_products(small: Any) -> None:
    """What several products read is rounded before the first of them."""
    model = small.model("one activation, two weights")
    weights = model.graph.initializers
    for name in reversed(list(weights)):
        weights[name] = weights.pop(name)
    assert QuantizeQdq(small.ranges)(model).modified
    check_graph(model)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_very_numbers(number: Any, small: Any, run: Any) -> None:
    """What ONNX Runtime computes is the product of the numbers that are stored."""
    model = small.model("batch dims")
    QuantizeQdq(small.ranges, number)(model)
    found = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    dequantize = next(n for n in model.graph if "W" in [v.name for v in n.inputs if v])
    assert found["W@scale"].shape == ((48,) if number == "int8" else ())
    assert dequantize.attributes.get_int("axis", -1) == (1 if number == "int8" else -1)
    weight = found["W"].astype(float) * found["W@scale"]
    x = small.feeds["z"]
    if number == "int8":
        scale = np.float32(np.abs(x).max() / 127)
        rounded = np.clip(np.rint(x / scale), -128, 127) * scale
    else:
        scale = np.float32(np.abs(x).max() / 448)
        rounded = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype("f") * scale
    want = rounded.astype(float) @ weight
    off = np.abs(run(model, small.given(model))["y"] - want)
    assert (off <= 2.0**-20 * (np.abs(rounded) @ np.abs(weight) + 1e-3)).all()


@pytest.mark.parametrize("number", NUMBERS)
def test_cuts_off_what_is_outside(number: Any, small: Any, run: Any) -> None:
    """A narrower range is obeyed, as wide below zero as above, on both sides."""
    model = small.graph(ONE)
    QuantizeQdq({"x": (-0.5, 0.75)}, number)(model)
    x = small.feeds["x"]
    assert x.min() < -0.75
    got = run(model, small.given(model))["y"]
    cut = run(model, {**small.given(model), "x": np.clip(x, -0.75, 0.75)})["y"]
    if number == "int8":  # -128 is one step further than 127
        limit = 0.75 / 127 * np.abs(small.weights["W"]).sum(0) * 1.01
        assert (np.abs(got - cut) <= limit).all()
    else:
        np.testing.assert_array_equal(got, cut)
    assert np.abs(got - x @ small.weights["W"]).max() > 1


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ends", [(0.0, 0.0), (2.0, 2.0), (-2.0, -2.0), (1.0, 3.0)])
def test_degenerate_ranges(ends: tuple[float, float], number: Any, small: Any, run: Any) -> None:
    """One value alone, zero alone, ranges without zero: they hold zero and both their ends."""
    model = small.graph(ONE)
    QuantizeQdq({"x": ends}, number)(model)
    weight = small.weights["W"]
    for value in (*ends, 0.0):
        x = np.full((1, 2, 32), value, np.float32)
        got = run(model, {**small.given(model), "x": x})["y"]
        limit = np.abs(value) * np.abs(weight).sum(0) / 7 + np.abs(weight).max() / 100 * abs(value)
        assert (np.abs(got - x @ weight) <= limit).all()


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.inf), (1.0, -1.0)])
@pytest.mark.parametrize("number", NUMBERS)
def test_refuses_ranges(bad: tuple[float, float], number: Any, small: Any) -> None:
    model = small.graph(ONE)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(OptionError, match="the range of x is"):
        QuantizeQdq({"x": bad}, number)(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_refuses_other_numbers() -> None:
    number: Any = "int4"
    with pytest.raises(OptionError, match="the 8-bit number is 'int4'"):
        QuantizeQdq({}, number)


@pytest.mark.parametrize("what", ["table", "tied", "tied Gemm"])
@pytest.mark.parametrize("number", NUMBERS)
def test_leaves_tables(what: str, number: Any, small: Any) -> None:
    """Equal to the byte, with the reason: also a table that is the head."""
    model = small.model(what)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    step = QuantizeQdq(small.ranges, number)
    assert not step(model).modified
    assert "rows are looked up" in step.plan(model)["E"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_leaves_what_has_no_range(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = small.model("two activations, one weight")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    step = QuantizeQdq({"x": small.ranges["x"]})
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_qdq"):
        assert not step(model).modified
    assert step.plan(model)["W"] == "z has no range"
    assert any("left W alone: z has no range" in r.getMessage() for r in caplog.records)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("number", NUMBERS)
def test_keep_and_only(number: Any, small: Any) -> None:
    for option, stored in (("keep", {"V"}), ("only", {"W"})):
        options: dict[str, Any] = {option: ("W",)}
        model = small.model("one activation, two weights")
        QuantizeQdq(small.ranges, number, **options)(model)
        types = {name: model.graph.initializers[name].dtype for name in "WV"}
        assert {n for n, dtype in types.items() if dtype == DTYPES[number]} == stored


@pytest.mark.parametrize("number", NUMBERS)
def test_stays_lazy(number: Any, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.model("one activation, two weights")
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert QuantizeQdq(small.ranges, number)(model).modified
    check_explicit(model.graph)


def test_options_are_short() -> None:
    step = QuantizeQdq({"b": (-1.5, 0.1), "a": (0.0, 3.0)}, "fp8", keep=("W",))
    digest = hashlib.sha256(b'[["a",0.0,3.0],["b",-1.5,0.1]]').hexdigest()
    ranges = {"count": 2, "sha256": digest}
    assert step.options() == {
        "ranges": ranges, "number": "fp8", "digits": "float32", "keep": ["W"], "only": None,
    }  # fmt: skip
    assert json.loads(json.dumps(step.options())) == step.options()


def _inputs(model: ir.Model, op_type: str, x: str) -> Any:
    """Return the first node of a kind that reads a value, itself or what was made of it."""
    for node in model.graph:
        first: Any = node.inputs[0]
        maker = first.producer()
        if node.op_type == op_type and x in (first.name, maker and maker.inputs[0].name):
            return node
    raise AssertionError(f"no {op_type} reads {x}")


def _constant(model: ir.Model, name: str, array: Any) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def _asymmetric(model: ir.Model) -> None:
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        _inputs(model, op_type, "x").replace_input_with(
            2, _constant(model, op_type, np.array(3, np.int8))
        )


def _unsigned(model: ir.Model) -> None:
    _inputs(model, "QuantizeLinear", "x").replace_input_with(
        2, _constant(model, "zero", np.array(0, np.uint8))
    )


def _scale_of_another(model: ir.Model) -> None:
    scale = _inputs(model, "QuantizeLinear", "z").inputs[1]
    _inputs(model, "DequantizeLinear", "x").replace_input_with(1, scale)


def _scale_of_another_weight(model: ir.Model) -> None:
    scale = model.graph.initializers["V@scale"]
    _inputs(model, "DequantizeLinear", "W").replace_input_with(1, scale)


def _axis(model: ir.Model) -> None:
    _inputs(model, "DequantizeLinear", "W").attributes["axis"] = ir.AttrInt64("axis", 0)


def _negative(model: ir.Model) -> None:
    _inputs(model, "QuantizeLinear", "x").replace_input_with(
        1, _constant(model, "scale", np.array(-1, np.float32))
    )


def _zero(model: ir.Model) -> None:
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        _inputs(model, op_type, "x").replace_input_with(
            1, _constant(model, op_type, np.array(0, np.float32))
        )


def _several(model: ir.Model) -> None:
    scales = _constant(model, "scales", np.ones(32, np.float32))
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        _inputs(model, op_type, "x").replace_input_with(1, scales)


def _left_out(model: ir.Model) -> None:
    _inputs(model, "DequantizeLinear", "W").resize_inputs(2)


def _cast_first(model: ir.Model) -> None:
    dequantize = _inputs(model, "DequantizeLinear", "W")
    cast = ir.node("Cast", dequantize.outputs, attributes={"to": 1}, name="cast")
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ir.convenience.replace_all_uses_with(dequantize.outputs[0], cast.outputs[0])
    cast.replace_input_with(0, dequantize.outputs[0])
    model.graph.insert_after(dequantize, cast)


def _of_16_bits(model: ir.Model) -> None:
    _inputs(model, "QuantizeLinear", "x").replace_input_with(
        1, _constant(model, "scale", np.array(1, ml_dtypes.bfloat16))
    )


def _read_as_it_is(model: ir.Model) -> None:
    whole = _inputs(model, "DequantizeLinear", "x").inputs[0]
    node = ir.node("Identity", [whole], name="reader")
    node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    model.graph.append(node)


FAULTS: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "a zero point that is not 0": (_asymmetric, "zero point other than 0"),
    "unsigned integers": (_unsigned, "numbers of UINT8"),
    "the scale of another activation": (_scale_of_another, "another scale"),
    "the scale of another weight": (_scale_of_another_weight, "has 32 scales along axis 1"),
    "the wrong axis": (_axis, r"48 scales along axis 0 of a weight \[32, 48\]"),
    "a negative scale": (_negative, "not above 0"),
    "a scale of 0": (_zero, "not above 0"),
    "several scales for an activation": (_several, "several scales"),
    "no zero point": (_left_out, "leaves out"),
    "a cast before the product": (_cast_first, "cast before they are multiplied"),
    "a scale of another type": (_of_16_bits, "a scale of BFLOAT16, expected float32 or float16"),
    "integers read as they are": (_read_as_it_is, "something else than DequantizeLinear"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_rules_of_tensorrt(what: str, small: Any) -> None:
    """Each rule that is broken is named, with the node."""
    change, words = FAULTS[what]
    model = small.graph(
        "(float[b,s,48] y, float[3,b,4,48] w, float[b,s,32] v) "
        "{ y = MatMul(x, W) w = MatMul(z, W) v = MatMul(y, V) }"
    )
    QuantizeQdq({**small.ranges, "y": (-9.0, 9.0)})(model)
    check_explicit(model.graph)
    change(model)
    with pytest.raises(InternalError, match=words):
        check_explicit(model.graph)


@pytest.fixture
def exact(whole_model: Any) -> Callable[[str], dict[str, ir.Model]]:
    """Return a function that gives the graphs of an exact engine of standard operators."""

    def build(name: str) -> dict[str, ir.Model]:
        graphs: dict[str, ir.Model] = whole_model(name)
        run_graph_passes(graphs, graph_passes("any"))
        return graphs

    return build


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(
    name: str, number: Any, exact: Any, first_step: Any, seen_ranges: Any, stop_fusing: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The answers of the exact engine but for noise, the same bytes again, by the rules.

    Noise of a part in 127, or in 16, of each factor in no common direction leaves a cosine near
    1; one wrong scale or weight does not.
    """
    ranges = seen_ranges(exact(name), tmp_path / "taps")
    want = first_step(exact(name), tmp_path / "exact")
    stop_fusing()
    steps: list[Step] = [
        {key: QuantizeQdq(found, number) for key, found in ranges.items()},
        StableNames(),
    ]
    digests = []
    for attempt in ("first", "second"):
        graphs = exact(name)
        run_graph_passes(graphs, steps)
        got = first_step(graphs, tmp_path / attempt)
        files = sorted((tmp_path / attempt).iterdir())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]
    for model in graphs.values():
        check_explicit(model.graph)
        assert {node.domain for node in model.graph} == {""}
    least = 0.99 if number == "int8" else 0.98
    for key, array in want.items():
        flat, moved = array.ravel().astype(float), got[key].ravel().astype(float)
        assert flat @ moved > least * np.linalg.norm(flat) * np.linalg.norm(moved), key
    stored = [v for m in graphs.values() for v in m.graph.initializers.values()]
    assert sum(v.dtype == DTYPES[number] and len(v.shape or ()) == 2 for v in stored) > 10
