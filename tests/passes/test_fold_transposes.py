"""FoldTransposes: what it folds, what it leaves alone, and that the numbers hold."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from eptc.passes.fold_transposes import FoldTransposes
from eptc.tensors import Array

FOLDS = {
    "linear": "t = Transpose <perm = [1, 0]> (W) y = MatMul(x, t)",
    "default permutation": "t = Transpose (W) y = MatMul(x, t)",
    "two readers of one transpose": (
        "t = Transpose <perm = [1, 0]> (W) p = MatMul(x, t) q = MatMul(x, t) y = Add(p, q)"
    ),
    "two transposes alike": (
        "t = Transpose <perm = [1, 0]> (W) u = Transpose (W) "
        "p = MatMul(x, t) q = MatMul(x, u) y = Add(p, q)"
    ),
}
LEAVES = {
    "read as it is, too": (
        "t = Transpose <perm = [1, 0]> (W) p = MatMul(x, t) q = MatMul(p, W) y = MatMul(q, t)",
        "also read as it is",
    ),
    "two layouts": (
        "t = Transpose <perm = [1, 0]> (W) u = Transpose <perm = [0, 1]> (W) "
        "p = MatMul(x, t) q = MatMul(p, u) y = MatMul(q, t)",
        "2 layouts",
    ),
    "an activation": ("t = Transpose <perm = [1, 0]> (x) u = MatMul(W, t) y = Transpose(u)", None),
    "no transpose": ("y = MatMul(x, W)", None),
}


def model(body: str, weight: str = "float[2,3] W = {1, 2, 3, 4, 5, 6}") -> ir.Model:
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4,3] x) => (float[4,n] y) '
        f"<{weight}> {{ {body} }}"
    )


def output(model: ir.Model) -> Array:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    (y,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(["y"], {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("body", FOLDS.values(), ids=FOLDS)
def test_folds(body: str) -> None:
    """No Transpose is left, the numbers are the same to the bit, a second run finds nothing."""
    m = model(body)
    before = output(m)
    assert FoldTransposes()(m).modified
    assert "Transpose" not in {node.op_type for node in m.graph}
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    np.testing.assert_array_equal(output(m), before)
    assert not FoldTransposes()(m).modified


def test_stays_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(FOLDS["linear"])
    monkeypatch.setattr(ir.TensorProtoTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert FoldTransposes()(m).modified
    weight = m.graph.initializers["W"]
    assert weight.shape == ir.Shape([3, 2])


def test_batched_weight() -> None:
    """Any permutation of any rank."""
    m = model(
        "t = Transpose <perm = [0, 2, 1]> (W) y = MatMul(x, t)",
        "float[1,2,3] W = {1, 2, 3, 4, 5, 6}",
    )
    before = output(m)
    assert FoldTransposes()(m).modified
    np.testing.assert_array_equal(output(m), before)


@pytest.mark.parametrize(("body", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves_alone(body: str, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Where a condition does not hold, the model stays the same to the byte; the log says why."""
    m = model(body, "float[3,3] W = {1, 2, 3, 4, 5, 6, 7, 8, 9}")
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.fold_transposes"):
        assert not FoldTransposes()(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    reasons = [record.message for record in caplog.records]
    assert len(reasons) == (1 if reason else 0)
    assert all(str(reason) in text for text in reasons)


@pytest.mark.parametrize(("value", "side"), [("W", "inputs"), ("W", "outputs"), ("t", "outputs")])
def test_leaves_what_callers_see(value: str, side: str) -> None:
    """A value that a caller can set or read keeps its meaning."""
    m = model(FOLDS["linear"])
    getattr(m.graph, side).append(ir.convenience.create_value_mapping(m.graph)[value])
    assert not FoldTransposes()(m).modified


def test_leaves_what_is_not_bound() -> None:
    m = model(FOLDS["linear"])
    m.graph.initializers["W"].const_value = None
    assert not FoldTransposes()(m).modified


def test_leaves_what_a_subgraph_transposes() -> None:
    m = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (bool c) => (float[3,2] y) '
        "<float[2,3] W = {1, 2, 3, 4, 5, 6}> { y = If (c) "
        "<then_branch = a () => (float[3,2] s) { s = Transpose(W) }, "
        "else_branch = b () => (float[3,2] r) { t = Transpose(W) r = Neg(t) }> }"
    )
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    assert not FoldTransposes()(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before


def test_options_make_the_pass() -> None:
    assert FoldTransposes() == FoldTransposes()
    assert repr(FoldTransposes()) == "FoldTransposes()"
    assert FoldTransposes().options() == {}
    assert (FoldTransposes.name, FoldTransposes.contract) == ("fold-transposes", "exact")
