"""QuantizeInt8Static: what it makes of a graph and its ranges, how far the answers move."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from eptc.errors import OptionError
from eptc.lower.quantizable import quantized_inputs
from eptc.lower.weights import WeightTensor
from eptc.passes.quantize_int8_static import QuantizeInt8Static
from eptc.pipeline import check_graph

Array = npt.NDArray[Any]

RNG = np.random.default_rng(0)
# Columns of very different sizes, one of zeros.
WEIGHTS: dict[str, Array] = {
    name: (RNG.normal(size=size) * np.geomspace(1e-3, 10, size[axis]).reshape(shape)).astype("f")
    for name, size, axis, shape in (
        ("W", (32, 48), 1, (1, -1)),
        ("V", (48, 32), 0, (-1, 1)),
        ("E", (70, 32), 0, (-1, 1)),
        ("b", (48,), 0, (-1,)),
    )
}
WEIGHTS["W"][:, 5] = WEIGHTS["V"][5] = WEIGHTS["E"][5] = 0
FEEDS: dict[str, Array] = {
    "x": (RNG.normal(size=(2, 5, 32)) + 1).astype("f"),
    "z": np.abs(RNG.normal(size=(3, 2, 4, 32)) + 5).astype("f"),
    "f": RNG.normal(size=(3, 32)).astype("f"),
    "ids": RNG.integers(0, 70, size=(2, 5)),
}
RANGES = {name: (float(FEEDS[name].min()), float(FEEDS[name].max())) for name in "xzf"}
INPUTS = "(float[b,s,32] x, float[3,b,4,32] z, float[b,32] f, int64[b,s] ids)"

# Output -> input and weight (turned?) of its product; None: rows of a table.
Products = dict[str, tuple[str, str, bool] | None]
CASES: dict[str, tuple[str, Products, dict[str, int]]] = {
    "bias": (
        "(float[b,s,48] y) { p = MatMul(x, W) y = Add(p, b) }",
        {"y": ("x", "W", False)},
        {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1},
    ),
    "batch dims": (
        "(float[3,b,4,48] y) { y = MatMul(z, W) }",
        {"y": ("z", "W", False)},
        {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1},
    ),
    "one activation, two weights": (
        "(float[b,s,48] y, float[b,s,48] w) "
        "{ y = MatMul(x, W) t = Transpose <perm = [1, 0]> (V) w = MatMul(x, t) }",
        {"y": ("x", "W", False), "w": ("x", "V", True)},
        {"QuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Transpose": 0},
    ),
    "two activations, one weight": (
        "(float[b,s,48] y, float[3,b,4,48] w) { y = MatMul(x, W) w = MatMul(z, W) }",
        {"y": ("x", "W", False), "w": ("z", "W", False)},
        {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2},
    ),
    "Gemm": (
        "(float[b,48] y) { y = Gemm <transB = 1> (f, V, b) }",
        {"y": ("f", "V", True)},
        {},  # ONNX Runtime makes Add and product of two axes a float32 Gemm again.
    ),
    "tied": (
        "(float[b,s,32] e, float[b,s,70] y) "
        "{ e = Gather(E, ids) t = Transpose(E) y = MatMul(x, t) }",
        {"e": None, "y": ("x", "E", True)},
        {"Gather": 2, "QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Transpose": 0},
    ),
}


def used(body: str) -> dict[str, Array]:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in WEIGHTS.items() if name in words}


def bound_of(product: tuple[str, str, bool] | None, symmetric: bool) -> Array:
    """Return how far each output may move.

    The activation moves by a step at most (half of it, and half for its zero point), the weight
    by half of one; float32 sums them up to 2**-20 of the terms.
    """
    if product is None:
        step = np.abs(WEIGHTS["E"]).max(1) / 127
        step[step == 0] = 1
        rows: Array = step[FEEDS["ids"]][..., None] * 0.5001
        return rows
    x, weight = FEEDS[product[0]], WEIGHTS[product[1]]
    weight = weight.T if product[2] else weight
    step = np.abs(weight).max(0) / 127
    unit = np.abs(x).max() / 127 / 2 if symmetric else (max(x.max(), 0) - min(x.min(), 0)) / 255
    terms = np.abs(x) @ np.abs(weight)
    moved: Array = (
        unit * (np.abs(weight) + step / 2).sum(0)
        + np.abs(x).sum(-1, keepdims=True) * step / 2
        + 2.0**-20 * (terms + 10)
    )
    return moved


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("body", "products", "operators"), CASES.values(), ids=CASES)
def test_quantizes(
    body: str, products: Products, operators: dict[str, int], symmetric: bool,
    weighted: Callable[..., ir.Model], run_ort: Callable[..., Any],
) -> None:  # fmt: skip
    """Answers within the bound of the steps, from integer kernels; a second run no-op."""
    text = f"{INPUTS} => {body}"
    plain, model = weighted(text, used(body)), weighted(text, used(body))
    step = QuantizeInt8Static(RANGES, symmetric=symmetric)
    assert step(model).modified
    check_graph(model)
    assert not step(model).modified
    activations = {product[0] for product in products.values() if product is not None}
    made = [node.op_type for node in model.graph]
    assert made.count("QuantizeLinear") == len(activations)
    feeds = {str(v.name): FEEDS[str(v.name)] for v in model.graph.inputs}
    want, got = run_ort(plain, feeds), run_ort(model, feeds)
    if not symmetric:
        assert {op: got.operators[op] for op in operators} == operators
        assert not (operators and got.operators["DequantizeLinear"])
    for name, product in products.items():
        moved = np.abs(got.outputs[name] - want.outputs[name])
        assert moved.max() > 0
        assert (moved <= bound_of(product, symmetric)).all()


def test_as_tensorrt_demands(weighted: Callable[..., ir.Model]) -> None:
    """int8 everywhere, zero points 0, and integers that DequantizeLinear alone reads."""
    body = "(float[b,s,32] e, float[b,s,70] y, float[b,s,48] w) "
    body += (
        "{ e = Gather(E, ids) t = Transpose(E) y = MatMul(x, t) p = MatMul(x, W) w = Add(p, b) }"
    )
    model = weighted(f"{INPUTS} => {body}", used(body))
    QuantizeInt8Static(RANGES, symmetric=True)(model)
    whole = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    for value in whole:
        if len(value.shape or ()) == 2:
            assert {node.op_type for node in value.consumers()} == {"DequantizeLinear"}
        else:
            assert value.const_value is not None
            assert value.const_value.numpy() == 0
    assert {v.name for v in whole} >= {"E", "W"}
    types = {v.dtype for node in model.graph for v in node.outputs if "Quantize" in node.op_type}
    assert ir.DataType.UINT8 not in types


@pytest.mark.parametrize("symmetric", [False, True])
def test_cuts_off_what_is_outside(
    symmetric: bool, weighted: Callable[..., ir.Model], run_ort: Callable[..., Any]
) -> None:
    """A narrower range is obeyed: the answer is that of the input cut off, within a step."""
    body, _, _ = CASES["two activations, one weight"]
    model = weighted(f"{INPUTS} => {body}", used(body))
    ends = (-0.5, 0.75)
    QuantizeInt8Static({"x": ends, "z": RANGES["z"]}, symmetric=symmetric)(model)
    cut = np.clip(FEEDS["x"], -0.75 if symmetric else -0.5, 0.75)
    got = run_ort(model, {str(v.name): FEEDS[str(v.name)] for v in model.graph.inputs})
    weight = WEIGHTS["W"]
    limit = (1.25 / 127) * np.abs(weight).sum(0) + np.abs(cut).sum(-1, keepdims=True) * (
        np.abs(weight).max(0) / 127
    )
    assert (np.abs(got.outputs["y"] - cut @ weight) <= limit).all()
    assert (np.abs(FEEDS["x"] @ weight - cut @ weight) > 3 * limit).any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (2.0, 2.0), (-2.0, -2.0), (1.0, 3.0), (-3.0, -1.0)])
def test_degenerate_ranges(
    ends: tuple[float, float], symmetric: bool, weighted: Callable[..., ir.Model],
    run_ort: Callable[..., Any],
) -> None:  # fmt: skip
    """One value alone, zero alone, ranges without zero: they hold zero and both their ends."""
    model = weighted("(float[b,s,32] x) => (float[b,s,48] y) { y = MatMul(x, W) }", used("W"))
    QuantizeInt8Static({"x": ends}, symmetric=symmetric)(model)
    for value in (*ends, 0.0):
        x = np.full((1, 2, 32), value, np.float32)
        got = run_ort(model, {"x": x}).outputs["y"]
        weight = WEIGHTS["W"]
        step = np.abs(weight).max(0) / 127
        # The activation by a step of 3 / 127 at most, the weight by half of one.
        limit = abs(value) / 100 * np.abs(weight).sum(0) + abs(value) * 32 * step * 0.51
        assert (np.abs(got - x @ weight) <= limit).all()


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.inf), (1.0, -1.0)])
def test_refuses_ranges(bad: tuple[float, float], weighted: Callable[..., ir.Model]) -> None:
    model = weighted("(float[b,s,32] x) => (float[b,s,48] y) { y = MatMul(x, W) }", used("W"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(OptionError, match="the range of x is"):
        QuantizeInt8Static({"x": bad})(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_leaves_what_has_no_range(
    weighted: Callable[..., ir.Model], caplog: pytest.LogCaptureFixture
) -> None:
    """Equal to the byte, with the reason; other weights are quantized all the same."""
    body = CASES["two activations, one weight"][0]
    model = weighted(f"{INPUTS} => {body}", used(body))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_int8_static"):
        assert not QuantizeInt8Static({"x": RANGES["x"]})(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert any("left W alone: z has no range" in r.getMessage() for r in caplog.records)
    body = "(float[b,s,48] y, float[b,48] w) { y = MatMul(x, W) w = Gemm <transB = 1> (f, V) }"
    model = weighted(f"{INPUTS} => {body}", used(body))
    assert QuantizeInt8Static({"f": RANGES["f"], "unheard": (0, 1)})(model).modified
    types = {name: model.graph.initializers[name].dtype for name in ("W", "V")}
    assert types == {"W": ir.DataType.FLOAT, "V": ir.DataType.INT8}


@pytest.mark.parametrize("body", [body for body, _, _ in CASES.values()], ids=CASES)
def test_its_ranges_are_those_that_are_asked_for(
    body: str, weighted: Callable[..., ir.Model]
) -> None:
    """With a range for each of `quantized_inputs` all is quantized; without any one, not all."""
    names = quantized_inputs(weighted(f"{INPUTS} => {body}", used(body)).graph)
    for missing in (None, *names):
        model = weighted(f"{INPUTS} => {body}", used(body))
        QuantizeInt8Static({n: RANGES[n] for n in names if n != missing})(model)
        kept = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
        assert any(len(v.shape or ()) == 2 for v in kept) is (missing is not None)


def test_keep_only_and_reduce_range(weighted: Callable[..., ir.Model]) -> None:
    body = CASES["one activation, two weights"][0]
    for options, whole in (
        ({"keep": ("W",)}, {"V"}),
        ({"only": ("W",)}, {"W"}),
        ({"reduce_range": True}, {"W", "V"}),
    ):
        model = weighted(f"{INPUTS} => {body}", used(body))
        QuantizeInt8Static(RANGES, **options)(model)
        stored = {n: v for n, v in model.graph.initializers.items() if n in WEIGHTS}
        assert {n for n, v in stored.items() if v.dtype == ir.DataType.INT8} == whole
        for name in whole:
            tensor = stored[name].const_value
            assert tensor is not None
            assert np.abs(tensor.numpy()).max() == (64 if "reduce_range" in options else 127)


def test_a_chain(weighted: Callable[..., ir.Model], run_ort: Callable[..., Any]) -> None:
    """What one product makes is what another multiplies, and so are a table's rows."""
    body = "(float[b,s,48] y, float[b,s,48] w) "
    body += "{ p = MatMul(x, I) y = MatMul(p, W) e = Gather(E, ids) w = MatMul(e, W) }"
    weights = {**used(body), "I": np.eye(32, dtype="f")}
    plain, model = (weighted(f"{INPUTS} => {body}", weights) for _ in range(2))
    table = (float(WEIGHTS["E"].min()), float(WEIGHTS["E"].max()))
    ranges = {"x": RANGES["x"], "p": RANGES["x"], "e": table}
    assert QuantizeInt8Static(ranges)(model).modified
    check_graph(model)
    want, got = run_ort(plain, FEEDS), run_ort(model, FEEDS)
    assert not got.operators["MatMul"]
    # The identity costs half a step of x, once more: twice the bound of one product.
    limit = 2 * bound_of(("x", "W", False), False)
    assert (np.abs(got.outputs["y"] - want.outputs["y"]) <= limit).all()


def test_stays_lazy(weighted: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    body = CASES["tied"][0]
    model = weighted(f"{INPUTS} => {body}", used(body))
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert QuantizeInt8Static(RANGES)(model).modified


def test_options_are_short() -> None:
    """Of the ranges a number and a digest, which any order gives and any other number changes."""
    ranges = {"b/MatMul": (-1.5, 0.1), "a/MatMul": (0.0, 3.0)}
    step = QuantizeInt8Static(ranges, symmetric=True, keep=("W",))
    text = '[["a/MatMul",0.0,3.0],["b/MatMul",-1.5,0.1]]'
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert step.options() == {
        "ranges": {"count": 2, "sha256": digest},
        "symmetric": True,
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
