"""QuantizeInt8Dynamic: what it makes of a graph, how far the answers move, what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from eptc.lower.int8 import quantize
from eptc.lower.weights import bound
from eptc.lower.write import write
from eptc.passes.quantize_int8_dynamic import QuantizeInt8Dynamic
from eptc.run_passes import check_graph
from eptc.tensors import ArrayTensor

# What each graph becomes when ONNX Runtime loads it.
FUSED: dict[str, dict[str, int]] = {
    "bias": {"DynamicQuantizeMatMul": 1, "Add": 0},
    "batch dims": {"DynamicQuantizeMatMul": 1},
    "one activation, two weights": {
        "DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Transpose": 0, "Add": 0,
    },
    "two activations, one weight": {"DynamicQuantizeMatMul": 2},
    "Gemm": {"DynamicQuantizeMatMul": 1, "Add": 0, "Transpose": 0},
    "Gemm without bias": {"DynamicQuantizeMatMul": 1},
    "table": {"Gather": 2, "Cast": 1, "Mul": 1},
    "tied": {"Gather": 2, "DynamicQuantizeMatMul": 1, "Transpose": 0},
    "tied Gemm": {"Gather": 2, "DynamicQuantizeMatMul": 1, "Transpose": 0},
}  # fmt: skip


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("what", FUSED)
def test_quantizes(what: str, reduce_range: bool, small: Any, run_ort: Callable[..., Any]) -> None:
    """Answers within the bound of the steps, from kernels that are fused; a second run no-op."""
    plain, model, products = small.model(what), small.model(what), small.products(what)
    step = QuantizeInt8Dynamic(reduce_range=reduce_range)
    assert step(model).modified
    check_graph(model)
    assert not step(model).modified
    activations = {product[0] for product in products.values() if product is not None}
    made = [node.op_type for node in model.graph]
    assert made.count("DynamicQuantizeLinear") == len(activations)
    feeds = small.given(model)
    want, got = run_ort(plain, feeds), run_ort(model, feeds)
    assert {op: got.operators[op] for op in FUSED[what]} == FUSED[what]
    assert not got.operators["MatMulInteger"]
    for name, product in products.items():
        moved = np.abs(got.outputs[name] - want.outputs[name])
        limit = small.bound(product) * (127 / 64 if reduce_range else 1)
        assert moved.max() > 0
        assert (moved <= limit).all()


@pytest.mark.parametrize(("axis", "what"), [(1, "bias"), (0, "tied")])
def test_what_is_stored(axis: int, what: str, small: Any) -> None:
    """int8 under the parameter's name and shape, a float32 step for each channel beside it."""
    model = small.model(what)
    name = "W" if axis else "E"
    QuantizeInt8Dynamic()(model)
    stored = model.graph.initializers
    whole, scale = stored[name].const_value, stored[f"{name}@scale"].const_value
    assert whole is not None
    assert scale is not None
    want = quantize(small.weights[name], axis)
    np.testing.assert_array_equal(whole.numpy(), want[0])
    np.testing.assert_array_equal(scale.numpy(), want[1])
    floats = [v for v in stored.values() if v.dtype == ir.DataType.FLOAT]
    assert all(len(value.shape or ()) < 2 for value in floats)


def test_leaves_and_says_why(small: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What is to be kept, and what cannot be integers: equal to the byte."""
    model = small.model("bias")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_int8_dynamic"):
        assert not QuantizeInt8Dynamic(keep=("W",))(model).modified
        assert not QuantizeInt8Dynamic(only=("V",))(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    said = [r.getMessage() for r in caplog.records if r.name.startswith("eptc")]
    for reason in ("W alone: it is to be kept", "W alone: it is not to be", "b alone: it is no"):
        assert any(reason in message for message in said)


def test_written_once(small: Any, tmp_path: Path) -> None:
    """Two graphs share a table's integers and steps; the same input gives the same bytes."""
    tables = bound(ArrayTensor("E", np.tile(small.weights["E"], (10, 1))), "E")
    contents = []
    for attempt in range(2):
        graphs = {}
        for key, what in (("encoder", "table"), ("decoder", "tied")):
            model = small.model(what)
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
