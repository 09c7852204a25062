"""CountInFloat: the same counts; sums of other numbers stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.passes.count_in_float import CountInFloat
from eptc.run_passes import check_graph, run_graph_passes


def model(body: str, kind: str = "int64") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({kind}[b,n] x) => ({kind}[b,n] y) '
        f"<int64 axis = {{1}}, {kind} pad = {{3}}> {{ {body} }}"
    )


COUNT = "e = Equal(x, pad) n = Not(e) i = Cast <to = {to}> (n) y = CumSum{how} (i, axis)"


TWICE = (
    "e = Equal(x, pad) n = Not(e) h = Cast <to = 6> (n) i = Cast <to = {to}> (h) "
    "y = CumSum{how} (i, axis)"
)


@pytest.mark.parametrize("count", [COUNT, TWICE])
@pytest.mark.parametrize("how", ["", "<reverse = 1>", "<exclusive = 1>"])
@pytest.mark.parametrize(("kind", "to"), [("int64", 7), ("int32", 6)])
def test_counts(kind: str, to: int, how: str, count: str) -> None:
    """Whatever the direction; a second run changes nothing."""
    body = count.format(to=to, how=how)
    before, after = model(body, kind), model(body, kind)
    (record,) = run_graph_passes({"g": after}, [CountInFloat()])
    assert record.changed
    (summed,) = [node for node in after.graph if node.op_type == "CumSum"]
    assert summed.inputs[0] is not None
    assert summed.inputs[0].dtype == ir.DataType.FLOAT
    x = np.random.default_rng(0).integers(0, 5, (3, 40)).astype(kind)
    answers = [
        onnxruntime.InferenceSession(
            ir.to_proto(each).SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {"x": x})[0]
        for each in (before, after)
    ]
    assert answers[1].dtype == kind
    np.testing.assert_array_equal(*answers)
    check_graph(after)
    assert CountInFloat().rewrite(after) == 0


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("y = CumSum(x, axis)", "int64"),
        ("y = CumSum(x, axis)", "float"),
        ("f = Cast <to = 1> (x) i = Cast <to = 7> (f) y = CumSum(i, axis)", "int64"),
    ],
)
def test_left_alone(body: str, kind: str) -> None:
    """What is not counted may be large: equal to the byte."""
    found = model(body, kind)
    before = ir.to_proto(found).SerializeToString(deterministic=True)
    assert CountInFloat().rewrite(found) == 0
    assert ir.to_proto(found).SerializeToString(deterministic=True) == before
