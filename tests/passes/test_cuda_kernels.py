"""Graphs that are fused for CUDA hold nothing that ONNX Runtime's CUDA provider has no kernel for.

The table is of docs/OperatorKernels.md in ONNX Runtime's repository (its main branch after 1.24),
kernels for opset 20: of each operator the types of all its inputs and outputs together. A kernel
that the table registers from a version on, and the operator has a newer one at opset 20, is none:
ONNX Runtime matches versions exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx.defs
import onnx_ir as ir
import pytest

from eptc.lower.edit import MICROSOFT
from eptc.pipeline import graph_passes, lossy_passes
from eptc.precision import Precision
from eptc.run_passes import run_graph_passes

FLOATS = "FLOAT FLOAT16 BFLOAT16"
ANY = f"{FLOATS} INT32 INT64 BOOL UINT8 INT8"
# Operator, the version its kernel is of, types.
TABLE: dict[tuple[str, str], tuple[int, str]] = {
    ("", "Abs"): (13, f"{FLOATS} INT32 INT64"), ("", "Add"): (14, f"{FLOATS} INT32 INT64"),
    ("", "And"): (7, "BOOL"), ("", "Cast"): (19, ANY), ("", "Clip"): (13, "FLOAT FLOAT16 INT64"),
    ("", "Concat"): (13, ANY), ("", "ConstantOfShape"): (9, ANY),
    ("", "Cos"): (7, "FLOAT FLOAT16"), ("", "CumSum"): (14, "FLOAT FLOAT16 INT32 INT64"),
    ("", "DequantizeLinear"): (19, "INT8 UINT8 FLOAT FLOAT16"),
    ("", "Div"): (14, f"{FLOATS} INT32 INT64"), ("", "Equal"): (13, "FLOAT INT32 INT64 BOOL"),
    ("", "Erf"): (13, FLOATS), ("", "Expand"): (13, ANY), ("", "Gather"): (13, ANY),
    ("", "Gelu"): (20, FLOATS), ("", "Gemm"): (13, FLOATS),
    ("", "GreaterOrEqual"): (16, "FLOAT FLOAT16 INT32 INT64 BOOL"),
    ("", "LayerNormalization"): (17, FLOATS),
    ("", "LessOrEqual"): (16, "FLOAT FLOAT16 INT32 INT64 BOOL"), ("", "MatMul"): (13, FLOATS),
    ("", "Mul"): (14, f"{FLOATS} INT32 INT64"), ("", "Not"): (1, "BOOL"),
    ("", "Pow"): (15, f"{FLOATS} INT32 INT64"),
    ("", "QuantizeLinear"): (19, "INT8 UINT8 FLOAT FLOAT16"),
    ("", "Range"): (11, "FLOAT INT32 INT64"), ("", "ReduceMean"): (18, "FLOAT FLOAT16 INT64"),
    ("", "Relu"): (14, FLOATS), ("", "Reshape"): (19, ANY), ("", "Shape"): (19, ANY),
    ("", "Sigmoid"): (13, FLOATS), ("", "Sin"): (7, "FLOAT FLOAT16"), ("", "Slice"): (13, ANY),
    ("", "Softmax"): (13, FLOATS), ("", "Split"): (18, ANY), ("", "Sqrt"): (13, FLOATS),
    ("", "Squeeze"): (13, ANY), ("", "Sub"): (14, f"{FLOATS} INT32 INT64"),
    ("", "Tanh"): (13, FLOATS), ("", "Transpose"): (13, ANY), ("", "Unsqueeze"): (13, ANY),
    ("", "Where"): (16, f"{FLOATS} BOOL INT32 INT64"),
    (MICROSOFT, "GatherBlockQuantized"): (1, f"{FLOATS} UINT8 INT32 INT64"),
    (MICROSOFT, "MatMulNBits"): (1, f"{FLOATS} UINT8"),
    (MICROSOFT, "MultiHeadAttention"): (1, FLOATS),
    (MICROSOFT, "RotaryEmbedding"): (1, f"{FLOATS} INT64"),
}  # fmt: skip
# What works on shapes is on the CPU by choice: its inputs are sizes, which are there anyway.
ON_SHAPES = {("", "ReduceProd")}

MODELS = ("bert", "roberta", "t5", "gated-t5", "llama", "grouped-llama")
PRECISIONS: tuple[Precision, ...] = (
    "fp32", "fp16", "bf16", "int8-static", "int8-weights", "int4",
)  # fmt: skip


def lowered(graphs: dict[str, ir.Model], precision: Precision) -> None:
    """Run the passes that a build for CUDA runs."""
    run_graph_passes(graphs, graph_passes("cuda"))
    if precision == "fp32":
        return
    ranges = {
        key: {str(value.name): (-4.0, 4.0) for node in model.graph for value in node.outputs}
        for key, model in graphs.items()
    }
    for step in lossy_passes(precision, "cuda", ranges=ranges, extremes=ranges):
        for key, model in graphs.items():
            (step[key] if isinstance(step, Mapping) else step).rewrite(model)


def why_not(node: ir.Node, opset: int) -> str | None:
    """Return why a node would not run on CUDA, or None."""
    operator = (node.domain, node.op_type)
    if operator not in TABLE:
        return "no kernel"
    version, types = TABLE[operator]
    if not node.domain and onnx.defs.get_schema(node.op_type, opset).since_version != version:
        return f"a kernel of version {version} alone"
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    found = {value.dtype.name for value in values if value.dtype is not None}
    assert len([value for value in values if value.dtype is None]) == 0, node
    rest = found - set(types.split())
    return f"no kernel for {', '.join(sorted(rest))}" if rest else None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_cuda_has_a_kernel(
    name: str, precision: Precision, whole_model: Callable[[str], Any]
) -> None:
    graphs = whole_model(name)
    lowered(graphs, precision)
    wrong = {
        f"{node.op_type}: {reason}"
        for model in graphs.values()
        for node in model.graph
        if (node.domain, node.op_type) not in ON_SHAPES
        and (reason := why_not(node, model.opset_imports[""])) is not None
    }
    assert not wrong
