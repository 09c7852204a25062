"""PackProjections: what it packs, what it leaves alone, and that the numbers hold."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from eptc.lower.weights import WeightTensor, bound
from eptc.passes.pack_projections import PackProjections
from eptc.tensors import Array, ArrayTensor

THREE = ("a.q: q = MatMul(x, Q)", "a.k: k = MatMul(x, K)", "a.v: v = MatMul(x, V)")
CAST = (
    "a.q: Q32 = Cast <to = 1> (Q)",
    "a.q: q = MatMul(x, Q32)",
    "a.k: K32 = Cast <to = 1> (K)",
    "a.k: k = MatMul(x, K32)",
)
LEAVES = {
    "another input": (("a.q: q = MatMul(x, Q)", "a.k: k = MatMul(z, K)"), None),
    "another module": (("a.q: q = MatMul(x, Q)", "b.k: k = MatMul(x, K)"), None),
    "one weight twice": (
        ("a.q: q = MatMul(x, Q)", "a.k: k = MatMul(x, Q)"),
        "its weight is read elsewhere",
    ),
    "no weight": (("a.q: q = MatMul(x, z)", "a.k: k = MatMul(x, x)"), "no weight"),
    "behind a cast": (CAST, "no weight"),
}


def model(lines: tuple[str, ...], dtype: str = "float32") -> ir.Model:
    """Build a graph on x, z [4, 4] of lines `module: statement`, with lazy weights."""
    names = [line.partition(": ")[0] for line in lines]
    outputs = [line.split()[1] for line in lines if "MatMul" in line]
    made = " ".join(f"{name}_ = Neg({name})" for name in outputs)
    m = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4,4] x, float[4,4] z) => '
        f"({', '.join(f'float[4,n] {name}_' for name in outputs)}) "
        f"{{ {' '.join(line.partition(': ')[2] for line in lines)} {made} }}"
    )
    for node, name in zip(m.graph, names, strict=False):
        node.name = f"{name}/{node.op_type}"
    rng = np.random.default_rng(0)
    for name, columns in (("Q", 4), ("K", 2), ("V", 3)):
        array = rng.normal(size=(4, columns)).astype(dtype)
        readers = [(n, i) for n in m.graph for i, v in enumerate(n.inputs) if v and v.name == name]
        if not readers:
            continue
        value = ir.Value(name=name, const_value=bound(ArrayTensor(name, array), name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        m.graph.register_initializer(value)
        for node, index in readers:
            node.replace_input_with(index, value)
    return m


def outputs(model: ir.Model) -> list[Array]:
    rng = np.random.default_rng(1)
    feeds = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in "xz"}
    found = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    return [np.asarray(array) for array in found]


@pytest.mark.parametrize(
    ("lines", "dtype", "name"),
    [(THREE, "float32", "Q+K+V"), (THREE[1:], "float32", "K+V")],
    ids=["three", "two"],
)
def test_packs(lines: tuple[str, ...], dtype: str, name: str) -> None:
    """One MatMul, one weight of the same type called after its parts, the same numbers."""
    m = model(lines, dtype)
    before = outputs(m)
    assert PackProjections()(m).modified
    operators = [node.op_type for node in m.graph]
    assert (operators.count("MatMul"), operators.count("Split")) == (1, 1)
    weights = [v for v in m.graph.initializers.values() if isinstance(v.const_value, WeightTensor)]
    assert [(v.name, str(v.dtype)) for v in weights] == [(name, dtype.upper().replace("32", ""))]
    assert {node.name.partition("/")[0] for node in m.graph if node.name} >= {"a"}
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    for got, want in zip(outputs(m), before, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not PackProjections()(m).modified


@pytest.mark.parametrize(("lines", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves_alone(
    lines: tuple[str, ...], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a condition does not hold, the model stays the same to the byte; the log says why."""
    m = model(lines)
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.pack_projections"):
        assert not PackProjections()(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    said = [r.message for r in caplog.records if r.name == "eptc.passes.pack_projections"]
    assert all(reason is not None and reason in message for message in said)
    assert bool(said) is (reason is not None)


def test_stays_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(THREE)
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert PackProjections()(m).modified


def test_equal_parts_are_one_tensor() -> None:
    """Two graphs that pack the same weights share what is written."""
    first, second = model(THREE), model(THREE)
    for name in "QKV":
        second.graph.initializers[name].const_value = first.graph.initializers[name].const_value
    keys = []
    for m in (first, second):
        assert PackProjections()(m).modified
        tensor = m.graph.initializers["Q+K+V"].const_value
        assert isinstance(tensor, WeightTensor)
        keys.append(tensor.key)
    assert keys[0] == keys[1]


@pytest.mark.parametrize("name", ["Q", "q"])
def test_leaves_what_callers_see(name: str) -> None:
    m = model(THREE[:2])
    m.graph.outputs.append(ir.convenience.create_value_mapping(m.graph)[name])
    assert not PackProjections()(m).modified


def test_leaves_what_is_not_bound() -> None:
    m = model(THREE[:2])
    m.graph.initializers["Q"].const_value = None
    assert not PackProjections()(m).modified
