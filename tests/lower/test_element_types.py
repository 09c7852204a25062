"""Element types of a graph that was read from a file: as onnx infers them."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from eptc.lower.element_types import element_types

TEXT = (
    '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g '
    "(float16[2,n,8] x, int64[2,n] ids, double[k] d) => (float[] y) "
    "<float16[8,8] W = {1}, float[1] zero = {0}, int64[1] shape = {3}> {"
    " s = Shape(x) c = Cast <to = 1> (x) e = Equal(ids, ids) w = Where(e, ids, ids)"
    " m = MatMul(x, W) a, b = Split <axis = -1, num_outputs = 2> (m) j = Concat <axis = 0> (a, b)"
    " o = ConstantOfShape(shape) p = ConstantOfShape <value = int32[1] {7}> (shape)"
    " f = Floor(d) n = IsNaN(d) v, i = TopK(d, shape) q = Range(shape, shape, shape)"
    " k = Constant <value = double[1] {7}> () y = Add(c, zero) }"
)


def test_as_onnx_infers() -> None:
    proto = onnx.parser.parse_model(TEXT)
    inferred = onnx.shape_inference.infer_shapes(proto)
    want = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    model = ir.from_proto(proto)
    found = {str(value.name): int(dtype) for value, dtype in element_types(model).items()}
    assert len(want) > 12
    assert {name: found[name] for name in want} == want
    assert found["x"] == found["W"] == onnx.TensorProto.FLOAT16


def test_operators_without_a_schema() -> None:
    """They make what they read first."""
    model = ir.from_proto(
        onnx.parser.parse_model(
            TEXT.replace("y = Add", "u = com.microsoft.MultiHeadAttention (x, x, x) y = Add")
        )
    )
    found = {str(value.name): dtype for value, dtype in element_types(model).items()}
    assert found["u"] == ir.DataType.FLOAT16
