"""ClipIntegers: Max and Min give what Clip gives; everything else stays as it is."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.passes.clip_integers import ClipIntegers
from eptc.run_passes import check_graph, run_graph_passes

BOUNDS = "<{0} low = {{-3}}, {0} high = {{2}}>"


def model(body: str, kind: str = "int64") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({kind}[n] x) => ({kind}[n] y) '
        f"{BOUNDS.format(kind)} {{ {body} }}"
    )


def operators(found: ir.Model) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in found.graph))


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("y = Clip(x, low, high)", {"Max": 1, "Min": 1}),
        ("y = Clip(x, high, low)", {"Max": 1, "Min": 1}),  # the upper bound wins
        ("y = Clip(x, low)", {"Max": 1}),
        ("y = Clip(x, , high)", {"Min": 1}),
        (
            "a = Clip(x, low, high) b = Add(a, x) y = Clip(b, , high)",
            {"Max": 1, "Min": 2, "Add": 1},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_integers(body: str, want: dict[str, int], kind: str) -> None:
    """The same numbers, at and beyond the bounds; a second run changes nothing."""
    before, after = model(body, kind), model(body, kind)
    (record,) = run_graph_passes({"g": after}, [ClipIntegers()])
    assert record.changed
    assert operators(after) == want
    x = np.arange(-6, 6).astype(kind)
    answers = [
        onnxruntime.InferenceSession(
            ir.to_proto(each).SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {"x": x})[0]
        for each in (before, after)
    ]
    np.testing.assert_array_equal(*answers)
    check_graph(after)
    assert ClipIntegers().rewrite(after) == 0


def test_shapes_stay_known() -> None:
    found = model("y = Clip(x, low, high)")
    ClipIntegers().rewrite(found)
    assert [str(node.outputs[0].shape) for node in found.graph] == ["[n]", "[n]"]


@pytest.mark.parametrize(
    ("body", "kind"), [("y = Clip(x, low, high)", "float"), ("y = Clip(x)", "int64")]
)
def test_left_alone(body: str, kind: str) -> None:
    """Floating-point numbers, and a Clip that does not clip: equal to the byte."""
    found = model(body, kind)
    before = ir.to_proto(found).SerializeToString(deterministic=True)
    assert ClipIntegers().rewrite(found) == 0
    assert ir.to_proto(found).SerializeToString(deterministic=True) == before
