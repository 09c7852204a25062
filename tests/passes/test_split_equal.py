"""SplitEqual: what it splits, what it leaves alone, and that the answers hold."""

from __future__ import annotations

import logging

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest

from eptc.passes.split_equal import SplitEqual

SPLITS = {
    "two inputs": "y = Equal(a, b)",
    "a constant": "p = Constant <value = int64[1] {2}> () y = Equal(a, p)",
    "broadcast": "r = Constant <value_ints = [0, 1, 2]> () y = Equal(a, r)",
    "with itself": "y = Equal(a, a)",
    "read inside": "e = Equal(a, b) y = Not(e)",
    "twice": "e = Equal(a, b) f = Equal(b, a) y = Or(e, f)",
    "int32": "c = Cast <to = 6> (a) d = Cast <to = 6> (b) y = Equal(c, d)",
}
LEAVES = {
    "float": ("c = Cast <to = 1> (a) d = Cast <to = 1> (b) y = Equal(c, d)", 20, "not compare"),
    "bool": ("c = Cast <to = 9> (a) d = Cast <to = 9> (b) y = Equal(c, d)", 20, "not compare"),
    "an earlier opset": ("y = Equal(a, b)", 18, "opset 18 and earlier"),
    "another comparison": ("y = LessOrEqual(a, b)", 20, ""),
}
A = np.array([[0, 1, 2], [-3, 4, 2]])
B = np.array([[0, 2, 2], [3, 4, -2]])


def model(body: str, opset: int = 20) -> ir.Model:
    made = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}]> '
        f"g (int64[n,3] a, int64[n,3] b) => (bool[n,3] y) {{ {body} }}"
    )
    for node in made.graph:  # as the tracer writes them: every value has a type
        if node.op_type == "Cast":
            node.outputs[0].dtype = ir.DataType(node.attributes["to"].as_int())
        elif node.op_type == "Constant":
            node.outputs[0].dtype = ir.DataType.INT64
        elif node.outputs[0].dtype is None:
            node.outputs[0].dtype = ir.DataType.BOOL
    return made


def answer(m: ir.Model) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    (y,) = onnx.reference.ReferenceEvaluator(ir.to_proto(m)).run(["y"], {"a": A, "b": B})
    return np.asarray(y)


@pytest.mark.parametrize("body", SPLITS.values(), ids=SPLITS)
def test_splits(body: str) -> None:
    """No Equal is left, the answers are the same, a second run finds nothing."""
    m = model(body)
    before = answer(m)
    assert SplitEqual()(m).modified
    assert not [node for node in m.graph if node.op_type == "Equal"]
    assert [value.name for value in m.graph.outputs] == ["y"]
    np.testing.assert_array_equal(answer(m), before)
    assert before.any() or before.size == 0
    assert not SplitEqual()(m).modified


def test_splits_from_the_first_version_without_a_kernel() -> None:
    assert SplitEqual()(model("y = Equal(a, b)", 19)).modified


@pytest.mark.parametrize(("body", "opset", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves(body: str, opset: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    m = model(body, opset)
    before = ir.to_proto(m).SerializeToString()
    assert not SplitEqual()(m).modified
    assert ir.to_proto(m).SerializeToString() == before
    assert reason in caplog.text


def test_types_are_known() -> None:
    """Passes behind it read types and shapes off the values."""
    m = model("y = Equal(a, b)")
    SplitEqual()(m)
    for node in m.graph:
        assert node.outputs[0].dtype == ir.DataType.BOOL
        assert node.outputs[0].shape is not None
