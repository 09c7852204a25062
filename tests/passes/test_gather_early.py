"""GatherEarly: what it moves up, what it leaves alone, and that the numbers hold."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from eptc.passes.gather_early import GatherEarly

Float32 = npt.NDArray[np.float32]
LAST = "y = Gather <axis = 1> (r, i)"
MOVES = {
    "linear": f"r = MatMul(x, W) {LAST}",
    "bias and residual": f"p = MatMul(x, W) q = Add(p, b) r = Add(q, x) {LAST}",
    "read twice inside": f"p = MatMul(x, W) q = Relu(p) r = Add(q, p) {LAST}",
    "norm": f"p = MatMul(x, W) r = LayerNormalization <axis = -1> (p, b) {LAST}",
    "one row for all positions": f"p = MatMul(x, W) r = Add(row, p) {LAST}",
    "columns added": (f"p = MatMul(x, W) q = Pad(p, behind, one) r = MatMul(q, X) {LAST}"),
    "heads": (
        "p = MatMul(x, W) h = Reshape(p, split) t = Transpose <perm = [0, 2, 1, 3]> (h) "
        "u = Transpose <perm = [0, 2, 3, 1]> (h2) m = MatMul(t, u) s = Softmax <axis = -1> (m) "
        f"v = MatMul(s, t2) w = Transpose <perm = [0, 2, 1, 3]> (v) r = Reshape(w, join) {LAST}"
    ),
}
LEAVES = {
    "another reader": (f"r = MatMul(x, W) {LAST} z = Relu(r)", "no MatMul"),
    "mixes positions": (
        f"p = MatMul(x, W) r = Softmax <axis = 1> (p) {LAST}",
        "no MatMul",
    ),
    "normalises over positions": (
        f"p = MatMul(x, W) r = LayerNormalization <axis = 1> (p, n) {LAST}",
        "no MatMul",
    ),
    "positions are columns": (
        "t = Transpose <perm = [0, 2, 1]> (x) r = MatMul(V, t) y = Gather <axis = 2> (r, i)",
        "no MatMul",
    ),
    "positions added": (f"p = MatMul(x, W) r = Pad(p, below, one) {LAST}", "no MatMul"),
    "no linear": (f"r = Relu(x) {LAST}", "no MatMul"),
    "moves between axes": (f"p = MatMul(x, W) r = Reshape(p, mixed) {LAST}", "no MatMul"),
    "several positions": ("r = MatMul(x, W) y = Gather <axis = 1> (r, two)", "not one constant"),
    "an input": ("r = MatMul(x, W) y = Gather <axis = 1> (x, i)", "not computed"),
}


def model(body: str, index: int = 0) -> ir.Model:
    """Parse a graph on x [batch, 3, 4], with the shapes of all values known."""
    weights = (
        "float[4,4] W = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 1}, "
        "float[3,4] V = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6}, "
        "float[4] b = {1, -1, 2, 0.5}, float[1,1,4] row = {1, 2, 3, 5}, "
        "float[3,4] n = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6}, "
        f"int64 i = {{{index}}}, int64[2] two = {{0, 1}}, int64[4] split = {{0, 0, 2, 2}}, "
        "int64[3] join = {0, 0, 4}, int64[3] mixed = {0, 4, 3}, float one = {1}, "
        "int64[6] behind = {0, 0, 0, 0, 0, 1}, int64[6] below = {0, 0, 0, 0, 1, 0}, "
        "float[5,4] X = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 1, 2, 4, 6, 8}"
    )
    outputs = ", ".join(f"float[] {name}" for name in "yz" if f"{name} = " in body)
    helpers = ""
    if "h2" in body:
        helpers = (
            "h2 = Reshape(x, split) t2 = Transpose <perm = [0, 2, 1, 3]> (h2) "  # keys, values
        )
    text = (
        '<ir_version: 10, opset_import: ["" : 20]> g (float[batch,3,4] x) => '
        f"({outputs}) <{weights}> {{ {helpers}{body} }}"
    )
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model) -> list[Float32]:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    outputs: Any = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return [np.asarray(output, np.float32) for output in outputs]


@pytest.mark.parametrize("index", [0, 2, -1])
@pytest.mark.parametrize("body", MOVES.values(), ids=MOVES)
def test_moves(body: str, index: int) -> None:
    """Every MatMul of the path sees one position, the numbers hold, a second run finds nothing."""
    m = model(body, index)
    before = run(m)
    assert GatherEarly()(m).modified
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    path = [node for node in m.graph if node.op_type in ("MatMul", "Softmax", "Add")]
    assert all(1 in (node.outputs[0].shape or ())[1:] for node in path)
    for got, want in zip(run(m), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
    assert not GatherEarly()(m).modified


@pytest.mark.parametrize(("body", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves_alone(body: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a condition does not hold, the model stays the same to the byte; the log says why."""
    m = model(body)
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.gather_early"):
        assert not GatherEarly()(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    assert [reason in record.message for record in caplog.records] == [True]


def test_leaves_what_callers_see() -> None:
    """A value that a caller reads is computed whole."""
    m = model(MOVES["linear"])
    m.graph.outputs.append(ir.convenience.create_value_mapping(m.graph)["r"])
    assert not GatherEarly()(m).modified


def test_leaves_what_has_no_shape() -> None:
    m = model(MOVES["bias and residual"])
    for node in m.graph:
        node.outputs[0].shape = None
    assert not GatherEarly()(m).modified


def test_reads_no_weight() -> None:
    """The weight has no data yet: nothing could be read."""
    m = model(MOVES["linear"])
    m.graph.initializers["W"].const_value = None
    assert GatherEarly()(m).modified
