"""FuseAttention: what it fuses, what it leaves alone, and that the numbers hold."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.passes.fuse_attention import FuseAttention

Float32 = npt.NDArray[np.float32]
HEADS = "perm = [0, 2, 1, 3]"
Q = f"q4 = Reshape(q, split) qt = Transpose <{HEADS}> (q4)"
K = "k4 = Reshape(k, split) kt = Transpose <perm = [0, 2, 3, 1]> (k4)"
V = f"v4 = Reshape(v, split) vt = Transpose <{HEADS}> (v4)"
SOFTMAX = "m = MatMul(qt, kt) c = Mul(m, scale) a = Add(c, bias) s = Softmax <axis = -1> (a)"
MERGE = f"o = MatMul(s, vt) ot = Transpose <{HEADS}> (o) y = Reshape(ot, join)"
CACHE = (
    f"k4 = Reshape(k, split) kn = Transpose <{HEADS}> (k4) "
    f"v4 = Reshape(v, split) vn = Transpose <{HEADS}> (v4) "
    "pk = Concat <axis = -2> (past_k, kn) pv = Concat <axis = 2> (past_v, vn) "
    "kt = Transpose <perm = [0, 1, 3, 2]> (pk) vt = Identity(pv)"
)
PLAIN = f"{Q} {K} {V} {SOFTMAX} {MERGE}"
CACHED = f"{Q} {CACHE} {SOFTMAX} {MERGE}".replace(" vt = Identity(pv)", "").replace("vt", "pv")
CROSS = f"{Q} kt = Transpose <perm = [0, 1, 3, 2]> (past_k) {SOFTMAX} {MERGE}".replace(
    "vt", "past_v"
)
FUSES = {
    "bias for each query": (PLAIN, "2,1,n,t", False),
    "bias for each head": (PLAIN, "1,3,n,t", False),
    "bias for all queries": (PLAIN, "2,1,1,t", False),
    "no scale": (
        PLAIN.replace("c = Mul(m, scale)", "").replace("Add(c", "Add(m"),
        "2,1,n,t",
        False,
    ),
    "no bias": (PLAIN.replace("a = Add(c, bias)", "").replace("(a)", "(c)"), "2,1,n,t", False),
    "cache": (CACHED, "2,1,n,t", True),
    "heads first": (CROSS, "2,1,n,t", True),
    "heads first, bias for all queries": (CROSS, "2,1,1,t", True),
}
LEAVES = {
    "softmax over queries": (PLAIN.replace("axis = -1", "axis = 2"), "not over keys"),
    "scores read elsewhere": (PLAIN + " z = Relu(c)", "something else reads"),
    "weights read elsewhere": (PLAIN + " z = Relu(s)", "MatMul is not what reads"),
    "merged otherwise": (PLAIN.replace("Reshape(ot, join)", "Reshape(o, join)")
                         .replace(f"ot = Transpose <{HEADS}> (o) ", ""), "Transpose is not"),
    "scaled by many": (PLAIN.replace("scale)", "scales)"), "scaled by one number"),
    "scaled after the bias": (
        PLAIN.replace("c = Mul(m, scale) a = Add(c, bias)", "c = Add(m, bias) a = Mul(c, scale)"),
        "scaled by one number",
    ),
    "cache grows by head": (
        CACHED.replace("pk = Concat <axis = -2>", "pk = Concat <axis = 1>"),
        "grow by position",
    ),
    "another number of heads": (
        PLAIN.replace("v4 = Reshape(v, split)", "v4 = Reshape(v, other)"),
        "groups of heads",
    ),
    "bias for one key": (PLAIN.replace("Add(c, bias)", "Add(c, one)"), "in another way"),
}  # fmt: skip


def model(body: str, bias: str = "2,1,n,t") -> ir.Model:
    """Parse a graph of 3 heads of 4 numbers with the shapes of all values known."""
    cached = "past_k" in body
    keys = "t" if "past_k" in body and "Concat" not in body else "p"
    inputs = [f"float[2,n,12] {name}" for name in "qkv"] + [f"float[{bias}] bias"]
    inputs += [f"float[2,3,{keys},4] past_{name}" for name in "kv" if cached]
    outputs = [f"float[] {n}" for n in ("y", "z", "pk", "pv") if f"{n} = " in body]
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> g ({", ".join(inputs)}) => '
        f"({', '.join(outputs)}) <int64[4] split = {{0, 0, 3, 4}}, "
        "int64[4] other = {0, 0, 6, 2}, int64[3] join = {0, 0, 12}, float scale = {0.5}, "
        "float[1,3,1,1] scales = {1, 2, 3}, "
        f"float[1,1,1,1] one = {{1}}> {{ {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in inferred.graph:
        if node.op_type == "Concat":
            node.outputs[0].shape = ir.Shape(["b", 3, "t", 4])
    return inferred


def run(model: ir.Model, past: int) -> list[Float32]:
    """Run with random inputs; the bias has holes, and one row sees no key at all."""
    rng = np.random.default_rng(0)
    named = {str(value.name): value for value in model.graph.inputs}
    grows = "past_k" in named and "p" in str(named["past_k"].shape)
    keys = past + 5 if grows else 7 if "past_k" in named else 5
    sizes = {"n": 5, "t": keys, "p": past}
    feeds = {}
    for name, value in named.items():
        shape = [n if isinstance(n, int) else sizes[str(n)] for n in value.shape or ()]
        feeds[name] = rng.standard_normal(shape).astype(np.float32)
    feeds["bias"][..., 1::2] = np.finfo(np.float32).min
    feeds["bias"][0, :, -1] = np.finfo(np.float32).min
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: Any = session.run(None, feeds)
    return [np.asarray(array) for array in found]


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize(("body", "bias", "cached"), FUSES.values(), ids=FUSES)
def test_fuses(body: str, bias: str, cached: bool, past: int) -> None:
    """One kernel, the same interface and numbers, a second run finds nothing."""
    m = model(body, bias)
    interface = [value.name for value in (*m.graph.inputs, *m.graph.outputs)]
    before = run(m, past)
    assert FuseAttention(only_cached=True)(m.clone()).modified is cached
    assert FuseAttention()(m).modified
    operators = [node.op_type for node in m.graph]
    assert operators.count("MultiHeadAttention") == 1
    assert not {"Softmax", "MatMul", "Transpose", "Reshape"} & set(operators)
    onnx.checker.check_model(ir.to_proto(m))
    assert [value.name for value in (*m.graph.inputs, *m.graph.outputs)] == interface
    for got, want in zip(run(m, past), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
    assert not FuseAttention()(m).modified


@pytest.mark.parametrize(("body", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves_alone(body: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a condition does not hold, the model stays the same to the byte; the log says why."""
    m = model(body)
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.fuse_attention"):
        assert not FuseAttention()(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    assert [reason in record.message for record in caplog.records] == [True], caplog.text


def test_leaves_groups_of_heads() -> None:
    """A cache of fewer heads than the queries have is none that the kernel takes."""
    m = model(CACHED)
    for value in m.graph.inputs:
        if value.name == "past_k":
            value.shape = ir.Shape([2, 1, "p", 4])
    assert not FuseAttention()(m).modified


def test_leaves_what_callers_see() -> None:
    """The weights of the attention are wanted by a caller."""
    m = model(PLAIN)
    m.graph.outputs.append(ir.convenience.create_value_mapping(m.graph)["s"])
    assert not FuseAttention()(m).modified


def test_leaves_what_has_no_shape() -> None:
    m = model(PLAIN)
    for node in m.graph:
        node.outputs[0].shape = None
    assert not FuseAttention()(m).modified


def test_one_expansion_for_all() -> None:
    """Layers that share a mask share what it is expanded to."""
    again = re.sub(r"\b(q4|qt|k4|kt|v4|vt|m|c|a|s|o|ot)\b(?! <)", r"\1_2", PLAIN)
    body = f"{PLAIN} {again.replace('y =', 'z =')}"
    m = model(body, "2,1,1,t")
    assert FuseAttention()(m).modified
    operators = [node.op_type for node in m.graph]
    assert (operators.count("MultiHeadAttention"), operators.count("Expand")) == (2, 1)


def test_options_make_the_pass() -> None:
    assert FuseAttention().options() == {"only_cached": False}
    assert FuseAttention(only_cached=True) != FuseAttention()
