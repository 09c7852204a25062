"""NarrowWeights: 16-bit weights are stored as they came, and every number stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.lower import bind, write
from eptc.passes.fold_transposes import FoldTransposes
from eptc.passes.narrow_weights import NarrowWeights
from eptc.run_passes import check_graph
from eptc.tensors import Array, ArrayTensor, LazyTensor

ROWS, WIDTH = 40, 24
TIED = (
    "e = Gather(E, ids) h = MatMul(e, W) b = Add(h, B) t = Transpose <perm = [1, 0]> (E) "
    "y = MatMul(b, t)"
)


def unbound(body: str = TIED) -> ir.Model:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (int64[n] ids) => (float[n,m] y) '
        f"<float[{ROWS},{WIDTH}] E, float[{WIDTH},{WIDTH}] W, float[{WIDTH}] B> {{ {body} }}"
    )
    for name, shape in (("E", (ROWS, WIDTH)), ("W", (WIDTH, WIDTH)), ("B", (WIDTH,))):
        value = next(v for node in model.graph for v in node.inputs if v and v.name == name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.inputs[:] = [v for v in model.graph.inputs if v is not value]
        model.graph.initializers.add(value)
    return model


def weights(dtype: npt.DTypeLike) -> dict[str, LazyTensor]:
    rng = np.random.default_rng(0)
    shapes = {"E": (ROWS, WIDTH), "W": (WIDTH, WIDTH), "B": (WIDTH,)}
    return {n: ArrayTensor(n, rng.normal(size=s).astype(dtype)) for n, s in shapes.items()}


def run(model: ir.Model, folder: Path) -> Array:
    folder.mkdir()
    write({"model": model}, folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"ids": np.array([3, 0, 39], np.int64)})[0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("fold", [False, True])
def test_narrow_and_wide_engines_are_equal(
    tmp_path: Path, dtype: npt.DTypeLike, fold: bool
) -> None:
    wide, narrow = unbound(), unbound()
    for model in (wide, narrow):
        bind({"model": model}, weights(dtype))
        if fold:
            FoldTransposes()(model)
    assert NarrowWeights()(narrow).modified
    check_graph(narrow)
    np.testing.assert_array_equal(run(narrow, tmp_path / "n"), run(wide, tmp_path / "w"))
    sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in "nw"]
    assert sizes[0] < 0.6 * sizes[1]  # each starts on a line of 64 bytes
    assert not NarrowWeights()(narrow).modified


def test_where_the_casts_stand() -> None:
    """One behind the rows that are gathered, one a weight for all its other readers."""
    model = unbound(TIED)
    bind({"model": model}, weights(np.float16))
    NarrowWeights()(model)
    nodes = {node.op_type: node for node in model.graph}
    assert Counter(node.op_type for node in model.graph)["Cast"] == 3
    assert nodes["Gather"].outputs[0].dtype == ir.DataType.FLOAT16
    types = {n: v.dtype for n, v in model.graph.initializers.items()}
    assert types == {
        "E": ir.DataType.FLOAT16,
        "W": ir.DataType.FLOAT16,
        "B": ir.DataType.FLOAT,  # a bias: small, and recognised by its type
    }


def test_a_cast_belongs_to_the_module_that_reads() -> None:
    model = unbound()
    for node in model.graph:
        node.name = f"block.3.mlp/{node.op_type}"
    bind({"model": model}, weights(np.float16))
    NarrowWeights()(model)
    assert {n.name for n in model.graph if n.op_type == "Cast"} == {
        "block.3.mlp/Cast.E.e",
        "block.3.mlp/Cast.W.h",
        "block.3.mlp/Cast.E.t",
    }


def test_leaves_float32_alone() -> None:
    model = unbound()
    bind({"model": model}, weights(np.float32))
    assert not NarrowWeights()(model).modified


def test_leaves_what_a_caller_sees() -> None:
    model = unbound("e = Gather(E, ids) h = MatMul(e, W) y = Add(h, B)")
    bind({"model": model}, weights(np.float16))
    model.graph.inputs.append(model.graph.initializers["W"])
    NarrowWeights()(model)
    assert model.graph.initializers["W"].dtype == ir.DataType.FLOAT
    assert model.graph.initializers["E"].dtype == ir.DataType.FLOAT16


def test_a_copy_of_the_graph_keeps_its_types() -> None:
    """Builds of one process start from copies of one traced graph."""
    model = unbound()
    copied = model.clone()
    before = str(model.graph)
    bind({"model": copied}, weights(np.float16))
    NarrowWeights()(copied)
    assert str(model.graph) == before


def test_reads_nothing() -> None:
    class Unread(ArrayTensor):
        def numpy(self) -> Array:
            raise AssertionError(f"{self.name} was read")

    model = unbound()
    unread = {n: Unread(n, t.numpy()) for n, t in weights(np.float16).items()}
    bind({"model": model}, unread)
    FoldTransposes()(model)
    assert NarrowWeights()(model).modified
