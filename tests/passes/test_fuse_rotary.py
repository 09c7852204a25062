"""FuseRotary: what it fuses, what it leaves alone, and that the numbers hold."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.passes.fuse_rotary import FuseRotary

HEADS = "perm = [0, 2, 1, 3]"
ANGLES = "aa = Concat <axis = -1> (a, a) c2 = Cos(aa) s2 = Sin(aa)"
TABLES = f"{ANGLES} c = Unsqueeze(c2, i1) s = Unsqueeze(s2, i1)"
SPLIT = f"h = Reshape(x, split) t = Transpose <{HEADS}> (h)"
TURN = (
    "x1 = Slice(t, i0, i2, i3, i1) x2 = Slice(t, i2, far, i3, i1) "
    "n2 = Neg(x2) r = Concat <axis = -1> (n2, x1)"
)
SUM = "p = Mul(t, c) q = Mul(r, s) y = Add(p, q)"
ROTARY = f"{TABLES} {SPLIT} {TURN} {SUM}"
TWICE = (
    ROTARY + f" h_2 = Reshape(x, split) t_2 = Transpose <{HEADS}> (h_2) "
    "x1_2 = Slice(t_2, i0, i2, i3, i1) x2_2 = Slice(t_2, i2, far, i3, i1) n2_2 = Neg(x2_2) "
    "r_2 = Concat <axis = -1> (n2_2, x1_2) p_2 = Mul(t_2, c) q_2 = Mul(r_2, s) z = Add(p_2, q_2)"
)
LEAVES = {
    "halves the other way round": (ROTARY.replace("(n2, x1)", "(n2, x2)"), "one half"),
    "not in the middle": (
        ROTARY.replace("Slice(t, i0, i2,", "Slice(t, i0, i3,").replace(
            "Slice(t, i2, far,", "Slice(t, i3, far,"
        ),
        "one half",
    ),
    "every other number": (ROTARY.replace("Slice(t, i0, i2, i3, i1)",
                                          "Slice(t, i0, far, i3, i2)"), "one half"),
    "two cosines": (ROTARY.replace("s2 = Sin(aa)", "s2 = Cos(aa)"), "cosine and sine"),
    "other angles": (
        ROTARY.replace("s2 = Sin(aa)", "b = Neg(a) bb = Concat <axis = -1> (b, b) s2 = Sin(bb)"),
        "cosine and sine",
    ),
    "angles of their own for each half": (
        ROTARY.replace("(a, a)", "(a, b)").replace("aa =", "b = Neg(a) aa ="),
        "cosine and sine",
    ),
    "scaled cosine": (
        ROTARY.replace("c = Unsqueeze(c2", "c3 = Mul(c2, two) c = Unsqueeze(c3"),
        "cosine and sine",
    ),
    "not split": (ROTARY.replace(SPLIT, "t = Transpose <perm = [0, 1, 2, 3]> (w)"), "split"),
    "a half read elsewhere": (ROTARY + " z = Relu(x1)", "something else reads"),
    "heads read elsewhere": (ROTARY + " z = Relu(t)", "something else reads"),
}  # fmt: skip


def model(body: str, angles: str = "b,n,2") -> ir.Model:
    """Parse a graph on x [b, n, 12], 3 heads of 4 numbers, with the shapes of all values known."""
    outputs = ", ".join(f"float[] {name}" for name in "yz" if f" {name} = " in body)
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[b,n,12] x, float[{angles}] a, '
        f"float[b,3,n,4] w) => ({outputs}) <int64[4] split = {{0, 0, 3, 4}}, "
        "int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] i2 = {2}, int64[1] i3 = {3}, "
        f"int64[1] far = {{9223372036854775807}}, float two = {{2}}> {{ {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, batch: int, length: int) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 5000, size=(batch, length, 1))
    feeds = {
        "x": rng.standard_normal((batch, length, 12)).astype(np.float32),
        "a": (positions * [1.0, 0.01]).astype(np.float32),
        "w": rng.standard_normal((batch, 3, length, 4)).astype(np.float32),
    }
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: Any = session.run(None, feeds)
    return [np.asarray(array) for array in found]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
@pytest.mark.parametrize("body", [ROTARY, TWICE], ids=["one", "two share the tables"])
def test_fuses(body: str, shape: tuple[int, int]) -> None:
    """Positions of any size and order; the tables are made once; a second run finds nothing."""
    m = model(body)
    before = run(m, *shape)
    assert FuseRotary()(m).modified
    operators = [node.op_type for node in m.graph]
    assert operators.count("RotaryEmbedding") == len(before)
    assert (operators.count("Cos"), operators.count("Slice")) == (1, 0)
    onnx.checker.check_model(ir.to_proto(m))
    for got, want in zip(run(m, *shape), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    assert not FuseRotary()(m).modified


@pytest.mark.parametrize(("body", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves_alone(body: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a condition does not hold, the model stays the same to the byte; the log says why."""
    m = model(body)
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.fuse_rotary"):
        assert not FuseRotary()(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    assert [reason in record.message for record in caplog.records] == [True], caplog.text


def test_leaves_angles_that_are_broadcast() -> None:
    """One row of angles for the whole batch would be too few rows."""
    assert not FuseRotary()(model(ROTARY, "1,n,2")).modified


def test_leaves_what_callers_see() -> None:
    m = model(ROTARY)
    m.graph.outputs.append(ir.convenience.create_value_mapping(m.graph)["x2"])
    assert not FuseRotary()(m).modified
