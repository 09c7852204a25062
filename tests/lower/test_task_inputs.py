"""Graphs whose tasks are inputs: the base where none is fed, and every task's adapter fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.lower.task_inputs import declare_optional, insert_factors, insert_heads

RNG = np.random.default_rng(0)
W, V, HEAD, BIAS = (
    RNG.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (4, 6), (2, 4), (2,))
)
LINEARS = {"one": (6, 4), "two": (4, 6), "elsewhere": (3, 3)}
HEADS: dict[str, tuple[int | str, ...]] = {"head.weight": ("labels", 4), "head.bias": ("labels",)}
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)


@pytest.fixture
def model() -> ir.Model:
    """Two linears one after the other, and a head on the first position."""
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, sequence, 4] x, float[6, 4] "one.weight", float[4, 6] "two.weight",
           float[2, 4] "head.weight", float[2] "head.bias")
        => (float[batch, sequence, 4] z, float[batch, 2] logits)
        <int64 first = {0}> {
            a = Transpose<perm = [1, 0]>("one.weight")
            h = MatMul(x, a)
            b = Transpose<perm = [1, 0]>("two.weight")
            z = MatMul(h, b)
            row = Gather<axis = 1>(z, first)
            logits = Gemm<transB = 1>(row, "head.weight", "head.bias")
        }
    """
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    found: ir.Model = ir.from_proto(proto)
    arrays = {"one.weight": W, "two.weight": V, "head.weight": HEAD, "head.bias": BIAS}
    for value in tuple(found.graph.inputs):
        if value.name in arrays:
            found.graph.inputs.remove(value)
            value.const_value = ir.tensor(arrays[value.name], name=value.name)
            found.graph.register_initializer(value)
    return found


def _session(model: ir.Model, folder: Path) -> onnxruntime.InferenceSession:
    insert_heads(model, HEADS)
    assert insert_factors(model, LINEARS) == {"one", "two"}
    declare_optional(model, LINEARS, HEADS)
    path = folder / "model.onnx"
    ir.save(model, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return onnxruntime.InferenceSession(path)


def _low_rank(path: str, rank: int) -> dict[str, Any]:
    out, columns = LINEARS[path]
    return {
        f"{path}.A": RNG.standard_normal((columns, rank)).astype(np.float32),
        f"{path}.B": RNG.standard_normal((rank, out)).astype(np.float32),
    }


def test_without_a_task_it_is_the_base(model: ir.Model, tmp_path: Path) -> None:
    session = _session(model, tmp_path)
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_overridable_initializers()] == [
        "elsewhere.A", "elsewhere.B", "head.bias", "head.weight", "one.A", "one.B", "two.A",
        "two.B",
    ]  # fmt: skip
    z, logits = session.run(None, {"x": X})
    np.testing.assert_allclose(z, X @ W.T @ V.T, atol=1e-5)
    assert logits.shape == (2, 0)


@pytest.mark.parametrize(("rank", "labels"), [(1, 2), (3, 5)])
def test_a_task_of_any_rank_and_number_of_labels(
    model: ir.Model, tmp_path: Path, rank: int, labels: int
) -> None:
    session = _session(model, tmp_path)
    one, two = _low_rank("one", rank), _low_rank("two", rank + 1)
    head = {
        "head.weight": RNG.standard_normal((labels, 4)).astype(np.float32),
        "head.bias": RNG.standard_normal(labels).astype(np.float32),
    }
    z, logits = session.run(None, {"x": X, **one, **two, **head})
    first = W.T + one["one.A"] @ one["one.B"]
    second = V.T + two["two.A"] @ two["two.B"]
    np.testing.assert_allclose(z, X @ first @ second, atol=1e-4)
    want = z[:, 0] @ head["head.weight"].T + head["head.bias"]
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_what_another_graph_reads_is_taken_and_changes_nothing(
    model: ir.Model, tmp_path: Path
) -> None:
    session = _session(model, tmp_path)
    (alone,) = session.run(["z"], {"x": X})
    (got,) = session.run(["z"], {"x": X, **_low_rank("elsewhere", 2)})
    np.testing.assert_array_equal(got, alone)


def test_a_head_of_fixed_size_is_zero_by_default(model: ir.Model, tmp_path: Path) -> None:
    """A parameter that does not depend on the labels keeps its shape: a session has no gaps."""
    heads: dict[str, tuple[int | str, ...]] = {"head.weight": (2, 4)}
    assert insert_heads(model, heads) == {"head.weight"}
    declare_optional(model, {}, heads)
    ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    logits = session.run(["logits"], {"x": X})[0]
    np.testing.assert_array_equal(logits, np.broadcast_to(BIAS, (2, 2)))
