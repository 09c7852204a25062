"""Types that do not fit are found in the graph, by the node; ONNX Runtime refuses the same."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest

from eptc.errors import InternalError
from eptc.lower.strong_types import check_types
from eptc.run_passes import check_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
FAULTS = {
    "two types added": (
        "(float[n] x, float16[n] h) => (float[n] y) { y = Add(x, h) }",
        r"\(Add\) has h of type tensor\(float16\), where another one is tensor\(float\)",
    ),
    "a result of another type": (
        "(float16[n] x) => (float[n] y) { y = Relu(x) }", r"\(Relu\) has y of type",
    ),
    "what an operator has no form for": (
        "(float[n] x, int8[n] k) => (float[n] y, int8[n] e) { y = Relu(x) e = Exp(k) }",
        r"\(Exp\) has k of type tensor\(int8\), which it has no form for",
    ),
    "two types side by side": (
        "(float[n] x, bfloat16[n] h) => (float[n] y) { y = Concat <axis = 0> (x, x, h) }",
        r"\(Concat\) has h of type tensor\(bfloat16\)",
    ),
    "a norm's weight": (
        "(float16[n,4] x, float[4] w) => (float16[n,4] y) { y = LayerNormalization(x, w) }",
        r"\(LayerNormalization\) has w of type tensor\(float\)",
    ),
}  # fmt: skip
SOUND = (
    "(float[n] x, float16[n] h, int64[n] i, bool[n] b) => (float[n] y, float[n] w) { "
    "c = Cast <to = 1> (h) y = Add(x, c) g = Gather(x, i) w = Where(b, g, c) s = Shape(h) "
    "k = Constant <value = int64 {2}> () "
    "p, q = Loop (k, , x, h) <body = body (int64 j, bool go, float[n] px, float16[n] ph) "
    "=> (bool on, float[n] py, float16[n] pz) "
    "{ on = Identity(go) py = Neg(px) pz = Identity(ph) }> }"
)


@pytest.mark.parametrize("what", FAULTS)
def test_faults(what: str) -> None:
    text, words = FAULTS[what]
    model = ir.from_onnx_text(HEAD + text)
    with pytest.raises(InternalError, match=words):
        check_types(model)
    with pytest.raises(InternalError, match=words):
        check_graph(model)
    with pytest.raises(Exception, match=r"Type (Error|parameter)"):
        onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )


def test_sound() -> None:
    model = ir.from_onnx_text(HEAD + SOUND)
    check_types(model)
    check_graph(model)


def test_a_cast_left_out() -> None:
    """What is sound with its Cast is not without it."""
    model = ir.from_onnx_text(HEAD + SOUND)
    cast = next(node for node in model.graph if node.op_type == "Cast")
    ir.convenience.replace_all_uses_with(cast.outputs[0], model.graph.inputs[1])
    with pytest.raises(InternalError, match=r"\(Add\) has h of type tensor\(float16\)"):
        check_types(model)
