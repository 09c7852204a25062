"""Activations that a block rounds to 8 bits, and the same block without that."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.parity_gate.rounding import rounds, without_rounding

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 1, (2, 5, 16)).astype(np.float32)
W = RANDOM.integers(-127, 128, (16, 8), np.int8)
SCALE = RANDOM.uniform(0.01, 0.02, 8).astype(np.float32)

# Two activations, so that one's scale or zero point can stand in the place of the other's.
TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[batch, tokens, 16] x) => (float[batch, tokens, 8] y, float[batch, tokens, 8] other)
<int8[16, 8] W, float[8] W_scale, float minus = {-2.0}>
{
  q, s, z = DynamicQuantizeLinear(x)
  sums = MatMulInteger(q, W, z)
  single = Cast<to = 1>(sums)
  both = Mul(s, W_scale)
  y = Mul(single, both)
  x2 = Mul(x, minus)
  q2, s2, z2 = DynamicQuantizeLinear(x2)
  sums2 = MatMulInteger(q2, W, z2)
  single2 = Cast<to = 1>(sums2)
  both2 = Mul(s2, W_scale)
  other = Mul(single2, both2)
}
"""


def graph(**instead: str) -> ir.Model:
    """Return the block; `sums="q, W, z2"` feeds one node other values."""
    text = TEXT
    for name, inputs in instead.items():
        before, _, after = text.partition(f"{name} = ")
        text = f"{before}{name} = {after[: after.index('(')]}({inputs}{after[after.index(')') :]}"
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend([
        onnx.numpy_helper.from_array(W, "W"), onnx.numpy_helper.from_array(SCALE, "W_scale"),
    ])  # fmt: skip
    return ir.from_proto(proto)


def run(model: ir.Model) -> tuple[Any, Any]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    y, other = session.run(None, {"x": X})
    return y, other


def test_products_are_exact() -> None:
    """As if nothing was ever rounded; with rounding they are off by a thousand times as much."""
    want = X.astype(np.float64) @ (W * SCALE.astype(np.float64))
    model = graph()
    assert rounds(model.graph)
    rounded = run(model)[0]
    without_rounding(model.graph)
    y, other = run(model)
    size = np.abs(want).max()
    assert np.abs(rounded - want).max() > 1e-3 * size
    assert np.abs(y - want).max() < 2e-6 * size
    assert np.abs(other + 2 * want).max() < 4e-6 * size


@pytest.mark.parametrize("what", ["sums", "both"])
def test_another_activations_numbers_show(what: str) -> None:
    """A zero point or a scale of another activation is as wrong as it is with rounding."""
    model = graph(**{what: {"sums": "q, W, z2", "both": "s2, W_scale"}[what]})
    without_rounding(model.graph)
    want = X.astype(np.float64) @ (W * SCALE.astype(np.float64))
    assert np.abs(run(model)[0] - want).max() > 0.1 * np.abs(want).max()


def test_nothing_is_rounded() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not rounds(model.graph)
    without_rounding(model.graph)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
