"""QuantizeInt8Dynamic: what it makes of a graph, how far the answers move, what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from eptc.lower.int8 import quantize
from eptc.lower.weights import WeightTensor, bound
from eptc.lower.write import write
from eptc.passes.quantize_int8_dynamic import QuantizeInt8Dynamic
from eptc.pipeline import check_graph
from eptc.tensors import ArrayTensor

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
    "z": np.abs(RNG.normal(size=(3, 2, 4, 32))).astype("f"),
    "f": RNG.normal(size=(3, 32)).astype("f"),
    "ids": RNG.integers(0, 70, size=(2, 5)),
}
INPUTS = "(float[b,s,32] x, float[3,b,4,32] z, float[b,32] f, int64[b,s] ids)"

# Output -> input and weight (turned?) of its product; None: rows of a table.
Products = dict[str, tuple[str, str, bool] | None]
CASES: dict[str, tuple[str, Products, dict[str, int]]] = {
    "bias": (
        "(float[b,s,48] y) { p = MatMul(x, W) y = Add(p, b) }",
        {"y": ("x", "W", False)},
        {"DynamicQuantizeMatMul": 1, "Add": 0},
    ),
    "batch dims": (
        "(float[3,b,4,48] y) { y = MatMul(z, W) }",
        {"y": ("z", "W", False)},
        {"DynamicQuantizeMatMul": 1},
    ),
    "one activation, two weights": (
        "(float[b,s,48] y, float[b,s,48] w) "
        "{ y = MatMul(x, W) t = Transpose <perm = [1, 0]> (V) p = MatMul(x, t) w = Add(p, b) }",
        {"y": ("x", "W", False), "w": ("x", "V", True)},
        {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Transpose": 0, "Add": 0},
    ),
    "two activations, one weight": (
        "(float[b,s,48] y, float[3,b,4,48] w) { y = MatMul(x, W) w = MatMul(z, W) }",
        {"y": ("x", "W", False), "w": ("z", "W", False)},
        {"DynamicQuantizeMatMul": 2},
    ),
    "Gemm": (
        "(float[b,48] y) { y = Gemm <transB = 1> (f, V, b) }",
        {"y": ("f", "V", True)},
        {"DynamicQuantizeMatMul": 1, "Add": 0, "Transpose": 0},
    ),
    "Gemm without bias": (
        "(float[b,48] y) { y = Gemm(f, W) }",
        {"y": ("f", "W", False)},
        {"DynamicQuantizeMatMul": 1},
    ),
    "table": (
        "(float[b,s,32] e) { e = Gather(E, ids) }",
        {"e": None},
        {"Gather": 2, "Cast": 1, "Mul": 1},
    ),
    "tied": (
        "(float[b,s,32] e, float[b,s,70] y) "
        "{ e = Gather(E, ids) t = Transpose(E) y = MatMul(x, t) }",
        {"e": None, "y": ("x", "E", True)},
        {"Gather": 2, "DynamicQuantizeMatMul": 1, "Transpose": 0},
    ),
    "tied Gemm": (
        "(float[b,s,32] e, float[b,70] y) { e = Gather(E, ids) y = Gemm <transB = 1> (f, E) }",
        {"e": None, "y": ("f", "E", True)},
        {"Gather": 2, "DynamicQuantizeMatMul": 1, "Transpose": 0},
    ),
}


def used(body: str) -> dict[str, Array]:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: array for name, array in WEIGHTS.items() if name in words}


def bound_of(product: tuple[str, str, bool] | None) -> Array:
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
    unit = (max(x.max(), 0) - min(x.min(), 0)) / 255
    terms = np.abs(x) @ np.abs(weight)
    moved: Array = (
        unit * (np.abs(weight) + step / 2).sum(0)
        + np.abs(x).sum(-1, keepdims=True) * step / 2
        + 2.0**-20 * (terms + 10)
    )
    return moved


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize(("body", "products", "operators"), CASES.values(), ids=CASES)
def test_quantizes(
    body: str, products: Products, operators: dict[str, int], reduce_range: bool,
    weighted: Callable[..., ir.Model], run_ort: Callable[..., Any],
) -> None:  # fmt: skip
    """Answers within the bound of the steps, from kernels that are fused; a second run no-op."""
    text = f"{INPUTS} => {body}"
    plain, model = weighted(text, used(body)), weighted(text, used(body))
    step = QuantizeInt8Dynamic(reduce_range=reduce_range)
    assert step(model).modified
    check_graph(model)
    assert not step(model).modified
    activations = {product[0] for product in products.values() if product is not None}
    made = [node.op_type for node in model.graph]
    assert made.count("DynamicQuantizeLinear") == len(activations)
    feeds = {str(v.name): FEEDS[str(v.name)] for v in model.graph.inputs}
    want, got = run_ort(plain, feeds), run_ort(model, feeds)
    assert {op: got.operators[op] for op in operators} == operators
    assert not got.operators["MatMulInteger"]
    for name, product in products.items():
        moved = np.abs(got.outputs[name] - want.outputs[name])
        limit = bound_of(product) * (127 / 64 if reduce_range else 1)
        assert moved.max() > 0
        assert (moved <= limit).all()


@pytest.mark.parametrize(("axis", "body"), [(1, CASES["bias"][0]), (0, CASES["tied"][0])])
def test_what_is_stored(axis: int, body: str, weighted: Callable[..., ir.Model]) -> None:
    """int8 under the parameter's name and shape, a float32 step for each channel beside it."""
    model = weighted(f"{INPUTS} => {body}", used(body))
    name = "W" if axis else "E"
    QuantizeInt8Dynamic()(model)
    stored = model.graph.initializers
    whole, scale = stored[name].const_value, stored[f"{name}@scale"].const_value
    assert whole is not None
    assert scale is not None
    want = quantize(WEIGHTS[name], axis)
    np.testing.assert_array_equal(whole.numpy(), want[0])
    np.testing.assert_array_equal(scale.numpy(), want[1])
    floats = [v for v in stored.values() if v.dtype == ir.DataType.FLOAT]
    assert all(len(value.shape or ()) < 2 for value in floats)
    model = weighted(f"{INPUTS} => {body}", used(body))
    QuantizeInt8Dynamic(reduce_range=True)(model)
    whole = model.graph.initializers[name].const_value
    assert whole is not None
    assert np.abs(whole.numpy()).max() == 64


def test_leaves_and_says_why(
    weighted: Callable[..., ir.Model], caplog: pytest.LogCaptureFixture
) -> None:
    """What is to be kept, and what cannot be integers: equal to the byte."""
    model = weighted(f"{INPUTS} => {CASES['bias'][0]}", used("W b"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_int8_dynamic"):
        assert not QuantizeInt8Dynamic(keep=("W",))(model).modified
        assert not QuantizeInt8Dynamic(only=("V",))(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    said = [r.getMessage() for r in caplog.records if r.name.startswith("eptc")]
    for reason in ("W alone: it is to be kept", "W alone: it is not to be", "b alone: it is no"):
        assert any(reason in message for message in said)


def test_a_chain(weighted: Callable[..., ir.Model], run_ort: Callable[..., Any]) -> None:
    """What one product makes is what another multiplies, and so are a table's rows."""
    body = "(float[b,s,48] y, float[b,s,48] w) "
    body += "{ p = MatMul(x, I) y = MatMul(p, W) e = Gather(E, ids) w = MatMul(e, W) }"
    weights = {**used(body), "I": np.eye(32, dtype="f")}
    plain, model = (weighted(f"{INPUTS} => {body}", weights) for _ in range(2))
    assert QuantizeInt8Dynamic()(model).modified
    check_graph(model)
    want, got = run_ort(plain, FEEDS), run_ort(model, FEEDS)
    assert not got.operators["MatMul"]
    # The identity costs half a step of x, once more: twice the bound of one product.
    limit = 2 * bound_of(("x", "W", False))
    assert (np.abs(got.outputs["y"] - want.outputs["y"]) <= limit).all()


def test_stays_lazy(weighted: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    body = CASES["tied"][0]
    model = weighted(f"{INPUTS} => {body}", used(body))
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert QuantizeInt8Dynamic()(model).modified


def test_written_once(weighted: Callable[..., ir.Model], tmp_path: Path) -> None:
    """Two graphs share a table's integers and steps; the same input gives the same bytes."""
    tables = bound(ArrayTensor("E", np.tile(WEIGHTS["E"], (10, 1))), "E")
    contents = []
    for attempt in range(2):
        graphs = {}
        for key, case in (("encoder", "table"), ("decoder", "tied")):
            model = weighted(f"{INPUTS} => {CASES[case][0]}", {"E": WEIGHTS["E"]})
            table = model.graph.initializers["E"]
            table.const_value, table.shape = tables, ir.Shape([700, 32])
            QuantizeInt8Dynamic()(model)
            graphs[key] = model
        folder = tmp_path / str(attempt)
        folder.mkdir()
        write(graphs, folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    # 700 rows of 32 integers and 700 steps; the second on a line of its own.
    assert len(contents[0]["weights.bin"]) <= 700 * 32 + 64 + 700 * 4
