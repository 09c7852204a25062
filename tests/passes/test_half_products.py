"""QuantizeQdq and then CastHalf: 8-bit products between fp16, every type in the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.calibration import round_values
from eptc.errors import InternalError, OptionError
from eptc.lower import write
from eptc.lower.element_types import element_types
from eptc.lower.explicit_quantization import check_explicit
from eptc.lower.sharing import is_scaling, sharing
from eptc.lower.strong_types import check_types
from eptc.lower.weights import WeightTensor
from eptc.passes.cast_half import CastHalf
from eptc.passes.quantize_qdq import QuantizeQdq
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes
from eptc.run_passes import check_graph, run_graph_passes

NUMBERS: list[Any] = ["int8", "fp8"]
HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
TWO = "(float[b,s,48] y, float[b,s,32] v) { y = MatMul(x, W) h = Relu(y) v = MatMul(h, V) }"


def halved(model: ir.Model, ends: Any, number: Any = "int8", **options: Any) -> ir.Model:
    """Run both passes, by the rules afterwards."""
    QuantizeQdq(ends, number, "float16")(model)
    magnitudes = {name: max(abs(low), abs(high)) for name, (low, high) in ends.items()}
    CastHalf("float16", options.pop("ranges", magnitudes), **options)(model)
    check_graph(model)
    check_types(model)
    check_explicit(model.graph)
    return model


def types_of(model: ir.Model) -> dict[str, ir.DataType | None]:
    """Return the type that each MatMul computes in, by what it makes; no cast is in a group."""
    for group in sharing(model.graph):
        floats = {v.dtype for n in group for v in n.outputs if v.dtype in (HALF, SINGLE)}
        assert len(floats) == 1
    types = element_types(model)
    return {str(n.name): types[n.outputs[0]] for n in model.graph if n.op_type == "MatMul"}


def run(model: ir.Model, feeds: Any, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write({"model": model}, folder)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, ["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def read(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def even(small: Any, body: str) -> ir.Model:
    """Return a graph whose weights have scales that float16 holds."""
    before = dict(small.weights)
    rng = np.random.default_rng(3)
    try:
        for name in "WV":
            small.weights[name] = rng.normal(size=before[name].shape).astype("f")
        model: ir.Model = small.graph(body)
    finally:
        small.weights.update(before)
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}.{number}"
    return model


@pytest.mark.parametrize("number", NUMBERS)
def test_the_very_numbers(number: Any, small: Any, tmp_path: Path) -> None:
    """The twin is the product of what is stored, rounded to fp16 where a value is fp16."""
    model = halved(even(small, "(float[3,b,4,48] y) { y = MatMul(z, W) }"), small.ranges, number)
    assert set(types_of(model).values()) == {HALF}
    stored = {n: read(model, n) for n in model.graph.initializers}
    scale = next(n for n in model.graph if n.op_type == "QuantizeLinear").inputs[1]
    assert scale is not None
    step = stored[str(scale.name)]
    assert step.dtype == stored["W@scale"].dtype == np.float16
    x = small.feeds["z"].astype(np.float16).astype("f")
    eight = stored["W"].dtype
    if number == "int8":
        q = np.clip(np.rint(x / step.astype("f")), -128, 127)
    else:
        q = np.clip(x / step.astype("f"), -448, 448).astype(eight).astype("f")
    xd = (q * step.astype("f")).astype(np.float16).astype(float)
    wd = (stored["W"].astype("f") * stored["W@scale"].astype("f")).astype(np.float16)
    want = (xd @ wd.astype(float)).astype(np.float16).astype(float)
    round_values(model)
    got = run(model, small.given(model), tmp_path / "twin")["y"]
    # Sums in another order may round the other way.
    assert (np.abs(got - want) <= 2.0**-10 * np.abs(want) + 1e-6).all()
    assert np.mean(got != want) < 0.02


@pytest.mark.parametrize("number", NUMBERS)
def test_scales_are_those_weights_were_rounded_for(number: Any, small: Any) -> None:
    """float16 has every scale as it is; a number is the nearest, within half of that step."""
    model = halved(even(small, "(float[b,s,48] y) { y = MatMul(x, W) }"), small.ranges, number)
    plain = even(small, "(float[b,s,48] y) { y = MatMul(x, W) }")
    stored = {n: read(model, n) for n in model.graph.initializers}
    scale = stored["W@scale"].astype(float)
    weight, off = read(plain, "W").astype(float), 0.5001 * scale
    if number == "fp8":
        off = np.maximum(np.abs(weight) / 16 * 1.0001, scale * 2.0**-10 * 1.0001)
        assert np.abs(stored["W"].astype(float)).max() > 440
    else:
        assert (np.abs(stored["W"]).max(axis=0) >= 126).all()
    assert (np.abs(stored["W"].astype(float) * scale - weight) <= off).all()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ends", [(-1e-4, 2e-4), (-1e-7, 1e-7), (-(2.0**-40), 0.0)])
def test_an_activation_with_a_small_scale(ends: Any, number: Any, small: Any) -> None:
    """It, and all that shares its scale, stays float32; the next product does not."""
    ranges = {"x": ends, "h": (0.0, 4.0)}
    model = even(small, TWO)
    before = even(small, TWO)
    QuantizeQdq(ranges, number, "float16")(before)
    reasons = CastHalf().plan(before)
    assert "below 6.1e-05" in reasons["MatMul.0"]
    found = types_of(halved(model, ranges, number))
    assert found == {"MatMul.0": SINGLE, "MatMul.2": HALF}


def test_a_weight_with_a_small_scale(small: Any, tmp_path: Path) -> None:
    """Named, its product stays float32; not named, nothing is written."""
    body = "(float[b,s,48] y) { y = MatMul(x, W) }"
    assert 0 < np.abs(small.weights["W"]).max(axis=0)[1] / 127 < 2.0**-14
    named = small.graph(body)
    QuantizeQdq(small.ranges, "int8", "float16")(named)
    step = CastHalf(small=("W",))
    assert any("W has scales below 6.1e-05" in reason for reason in step.plan(named).values())
    step(named)
    check_types(named)
    check_explicit(named.graph)
    assert named.graph.initializers["W@scale"].dtype == SINGLE
    want = run(small.graph(body), small.given(named), tmp_path / "exact")["y"]
    got = run(named, small.given(named), tmp_path / "small")["y"]
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    forgotten = small.graph(body)
    QuantizeQdq(small.ranges, "int8", "float16")(forgotten)
    CastHalf()(forgotten)
    with pytest.raises(OptionError, match=r"W@scale has a number that float16 does not hold"):
        read(forgotten, "W@scale")


def test_scales_of_all_digits_are_refused(small: Any) -> None:
    """A weight that was rounded for float32 scales is not given others."""
    model = even(small, "(float[b,s,48] y) { y = MatMul(x, W) }")
    QuantizeQdq(small.ranges)(model)
    CastHalf()(model)
    with pytest.raises(OptionError, match="weights would not be what they were rounded for"):
        read(model, "W@scale")


@pytest.mark.parametrize(
    ("ranges", "want"),
    [
        ({}, {"MatMul.0": HALF, "MatMul.2": HALF}),
        ({"x": 1e5}, {"MatMul.0": SINGLE, "MatMul.2": HALF}),
        ({"W": 1e5}, {"MatMul.0": SINGLE, "MatMul.2": HALF}),
        ({"h": 1e5}, {"MatMul.0": HALF, "MatMul.2": SINGLE}),
        ({"y": 1e5}, {"MatMul.0": SINGLE, "MatMul.2": HALF}),
    ],
)
def test_what_reaches_beyond_float16(ranges: Any, want: Any, small: Any) -> None:
    """Values keep their names through quantization, so that their ranges are found."""
    ends = {"x": small.ranges["x"], "h": (0.0, 9.0)}
    assert types_of(halved(even(small, TWO), ends, ranges=ranges)) == want


def test_a_gemm_beyond_float16(small: Any) -> None:
    """The product of which only the sum with its bias was observed is float32 with it."""
    model = even(small, "(float[b,48] y) { y = Gemm <transB = 1> (f, V, b) }")
    assert set(types_of(halved(model, small.ranges, ranges={"f": 1.0, "y": 1e5})).values()) == {
        SINGLE
    }


def test_bfloat16_leaves_products_alone(small: Any) -> None:
    """No provider quantizes it."""
    model = even(small, TWO)
    QuantizeQdq({"x": (-4, 4), "h": (0, 4)}, "int8", "bfloat16")(model)
    CastHalf("bfloat16")(model)
    check_types(model)
    assert set(types_of(model).values()) == {SINGLE}


def test_stays_lazy(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = even(small, TWO)
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    QuantizeQdq({"x": (-4, 4), "h": (0, 4)}, "int8", "float16")(model)
    assert CastHalf(small=("W",)).plan(model)
    assert CastHalf()(model).modified


def _other_type(model: ir.Model) -> None:
    """A scale of another type than what is quantized."""
    node = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    scale = ir.Value(name="wide", const_value=ir.tensor(np.array(0.5, "f"), name="wide"))
    scale.type, scale.shape = ir.TensorType(SINGLE), ir.Shape(())
    model.graph.register_initializer(scale)
    node.replace_input_with(1, scale)


def _forgotten_cast(model: ir.Model) -> None:
    """fp32 text goes into a product of fp16 as it is."""
    cast = next(n for n in model.graph if n.op_type == "Cast")
    assert cast.inputs[0] is not None
    ir.convenience.replace_all_uses_with(cast.outputs[0], cast.inputs[0])


@pytest.mark.parametrize("fault", [_other_type, _forgotten_cast])
def test_faults(fault: Callable[[ir.Model], None], small: Any) -> None:
    """What the passes make is sound, and is not with one type changed: the node is named."""
    model = halved(even(small, TWO), {"x": (-4, 4), "h": (0, 4)})
    fault(model)
    with pytest.raises(InternalError, match=r"\(QuantizeLinear\) has .* of type tensor"):
        check_types(model)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["bert", "t5", "gated-t5", "llama", "tied-llama"])
def test_whole_models(
    name: str, number: Any, whole_model: Any, first_step: Any, seen_ranges: Any, stop_fusing: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The answers of the exact engine but for noise, by TensorRT's rules, strongly typed.

    T5's `wo` reads and makes float32, what makes logits too; other products of 8 bits are fp16.
    """

    def exact() -> dict[str, ir.Model]:
        graphs: dict[str, ir.Model] = whole_model(name)
        run_graph_passes(graphs, graph_passes("any"))
        return graphs

    ranges = seen_ranges(exact(), tmp_path / "taps")
    want = first_step(exact(), tmp_path / "exact")
    stop_fusing()
    graphs = exact()
    for key, model in graphs.items():
        halved(model, ranges[key], number, ranges={})
        names = {str(n.name) for n in model.graph if n.op_type == "MatMul"}
        StableNames()(model)
        assert names == {str(n.name) for n in model.graph if n.op_type == "MatMul"}
        assert {node.domain for node in model.graph} == {""}
        products = {
            str(node.name): types
            for node, types in ((n, element_types(model)[n.outputs[0]]) for n in model.graph)
            if node.op_type == "MatMul" and any(is_scaling(maker) for maker in node.predecessors())
        }
        wide = {n for n, dtype in products.items() if dtype == SINGLE}
        assert wide == {n for n in products if ".wo/" in n or n.startswith("lm_head/")}
        assert len(products) > len(wide) + 5
        round_values(model)
    got = first_step(graphs, tmp_path / "twin")
    least = 0.99 if number == "int8" else 0.98
    for key, array in want.items():
        flat, moved = array.ravel().astype(float), got[key].ravel().astype(float)
        assert flat @ moved > least * np.linalg.norm(flat) * np.linalg.norm(moved), key
