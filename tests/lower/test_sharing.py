"""Which nodes around 8-bit products have one type, by the names of what they make."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from eptc.lower.sharing import quantized_from, sharing

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
CONSTANTS = (
    "<float s = {0.5}, float t = {0.25}, int8 o = {0}, int8[2] oo = {0, 0}, "
    "float[2] S = {1, 1}, float[2] T = {1, 1}, int8[2,2] W = {1, 2, 3, 4}, "
    "int8[2,2] V = {1, 2, 3, 4}>"
)
X = "xq = QuantizeLinear(x, s, o) xd = DequantizeLinear(xq, s, o) "
Z = "zq = QuantizeLinear(z, s, o) zd = DequantizeLinear(zq, s, o) "
W = "wd = DequantizeLinear <axis = 1> (W, S, oo) "
V = "vd = DequantizeLinear <axis = 1> (V, T, oo) "
TABLE = {
    "two products of one activation": (
        X + W + V + "y = MatMul(xd, wd) a = MatMul(xd, vd)",
        [{"xq", "xd", "wd", "vd", "y", "a"}],
    ),
    "two that share nothing but a scale's number and a zero": (
        X + Z + W + V + "y = MatMul(xd, wd) a = MatMul(zd, vd)",
        [{"xq", "xd", "wd", "y"}, {"zq", "zd", "vd", "a"}],
    ),
    "one weight read twice": (
        X + Z + W + "we = DequantizeLinear <axis = 1> (W, S, oo) "
        "y = MatMul(xd, wd) a = MatMul(zd, we)",
        [{"xq", "xd", "wd", "y", "zq", "zd", "we", "a"}],
    ),
    "a weight that is turned": (
        X + W + "wt = Transpose <perm = [1, 0]> (wd) y = MatMul(xd, wt) a = Relu(y)",
        [{"xq", "xd", "wd", "wt", "y"}],
    ),
    "one product after another": (
        X + W + V + "y = MatMul(xd, wd) yq = QuantizeLinear(y, t, o) "
        "yd = DequantizeLinear(yq, t, o) a = MatMul(yd, vd)",
        [{"xq", "xd", "wd", "y"}, {"yq", "yd", "vd", "a"}],
    ),
    "an activation that is turned first": (
        "xt = Transpose <perm = [1, 0]> (x) xq = QuantizeLinear(xt, s, o) "
        "xd = DequantizeLinear(xq, s, o) " + W + "y = MatMul(xd, wd) a = Relu(y)",
        [{"xq", "xd", "wd", "y"}],
    ),
    "nothing in 8 bits": ("y = MatMul(x, z) a = Relu(y)", []),
}


def graph(body: str) -> ir.Graph:
    text = f"{HEAD}(float[2,2] x, float[2,2] z) => (float[2,2] y, float[2,2] a) {CONSTANTS}"
    return ir.from_onnx_text(f"{text} {{ {body} }}").graph


@pytest.mark.parametrize("what", TABLE)
def test_groups(what: str) -> None:
    body, want = TABLE[what]
    groups = sharing(graph(body))
    found = [{str(node.outputs[0].name) for node in group} for group in groups]
    assert found == want
    assert [len(group) for group in groups] == [len(group) for group in want]  # each node once


def test_what_was_quantized() -> None:
    """The activation and the weight behind a product's operands; what is neither, itself."""
    body = X + W + "wt = Transpose(wd) y = MatMul(xd, wt) a = MatMul(y, z)"
    products = {node.outputs[0].name: node.inputs for node in graph(body)}
    names = {
        name: [str(quantized_from(value).name) for value in products[name] if value is not None]
        for name in ("y", "a")
    }
    assert names == {"y": ["x", "W"], "a": ["y", "z"]}
