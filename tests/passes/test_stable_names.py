"""StableNames: what it renames, what it keeps, and that history leaves no trace."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir

from eptc.passes.stable_names import StableNames

BODY = "val_3 = MatMul(x, W) y2 = Relu(val_3) y3 = Relu(y2) y = Add(y3, b)"


CONSTANTS = "float[2] b = {1, 2}, float[3,2] W = {1, 2, 3, 4, 5, 6}"


def model(body: str = BODY, constants: str = CONSTANTS) -> ir.Model:
    return ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20], producer_name: "pytorch"> '
        f"main (float[n,3] x) => (float[n,2] y) <{constants}> {{ {body} }}"
    )


def names(m: ir.Model) -> list[tuple[str | None, str | None]]:
    return [(node.name, node.outputs[0].name) for node in m.graph]


def content(m: ir.Model) -> bytes:
    return bytes(ir.to_proto(m).SerializeToString(deterministic=True))


def test_names_follow_the_operators() -> None:
    m = model()
    assert StableNames()(m).modified
    assert names(m) == [
        ("MatMul", "MatMul"),
        ("Relu", "Relu"),
        ("Relu_1", "Relu_1"),
        ("Add", "y"),
    ]
    assert list(m.graph.initializers) == ["W", "b"]
    assert (m.producer_name, m.graph.name) == ("eptc", "eptc")
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    x = np.ones((1, 3), np.float32)
    (y,) = onnx.reference.ReferenceEvaluator(ir.to_proto(m)).run(None, {"x": x})
    np.testing.assert_array_equal(y, [[10, 14]])


def test_the_module_stays() -> None:
    m = model()
    for index, node in enumerate(m.graph):
        node.name = f"encoder.{index // 2}/n{index}"
    StableNames()(m)
    assert [name for name, _ in names(m)] == [
        "encoder.0/MatMul",
        "encoder.0/Relu",
        "encoder.1/Relu",
        "encoder.1/Add",
    ]


def test_history_leaves_no_trace() -> None:
    """Two models that differ in names, notes and order of initializers become equal bytes."""
    one = model()
    two = model(
        "a = MatMul(x, W) b_1 = Relu(a) c = Relu(b_1) y = Add(c, b)",
        "float[3,2] W = {1, 2, 3, 4, 5, 6}, float[2] b = {1, 2}",
    )
    two.producer_version, two.doc_string = "2.13", "made by hand"
    two.metadata_props["path"] = "/home/somebody"
    two.graph.metadata_props["time"] = "now"
    two.graph.inputs[0].doc_string = "ids"
    two.graph.initializers["W"].metadata_props["trace"] = "x"
    for index, node in enumerate(two.graph):
        node.name, node.doc_string = f"n{index}", "text"
        node.metadata_props["stack_trace"] = f"<eval_with_key>.{index}"
        node.outputs[0].metadata_props["trace"] = "y"
    for m in (one, two):
        assert StableNames()(m).modified
    assert content(one) == content(two)


def test_second_run_changes_nothing() -> None:
    m = model()
    StableNames()(m)
    before = content(m)
    assert not StableNames()(m).modified
    assert content(m) == before


def test_the_interface_stays() -> None:
    """Inputs, outputs and initializers keep their names, also where a node would like one."""
    m = model(
        "Relu = MatMul(x, Add) t = Relu(Relu) y = Relu(t)", "float[3,2] Add = {1, 2, 3, 4, 5, 6}"
    )
    m.graph.outputs.append(ir.convenience.create_value_mapping(m.graph)["Relu"])
    StableNames()(m)
    assert [value.name for value in m.graph.outputs] == ["y", "Relu"]
    assert names(m) == [("MatMul", "Relu"), ("Relu_1", "Relu_1"), ("Relu_2", "y")]
    assert list(m.graph.initializers) == ["Add"]


def test_unknown_sizes_are_forgotten() -> None:
    m = model()
    values = ir.convenience.create_value_mapping(m.graph)
    values["val_3"].shape = ir.Shape(["n", "s53"])
    StableNames()(m)
    assert values["val_3"].shape == ir.Shape(["n", None])
    assert m.graph.inputs[0].shape == ir.Shape(["n", 3])


def test_several_outputs() -> None:
    m = model("p, q = Split <num_outputs = 2> (W) y = Concat <axis = 0> (p, q)")
    StableNames()(m)
    assert [value.name for value in next(iter(m.graph)).outputs] == ["Split", "Split:1"]


def test_subgraphs() -> None:
    """Every scope is renamed, and names stay unique over all of them."""
    m = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] y) '
        "{ k = Neg(x) y = If (c) <then_branch = a () => (float[2] s) { q = Neg(k) s = Neg(q) }, "
        "else_branch = b () => (float[2] r) { r = Neg(k) }> }"
    )
    assert StableNames()(m).modified
    found = [node.name for node in ir.traversal.RecursiveGraphIterator(m.graph)]
    assert len(found) == len(set(found)) == 5
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    before = content(m)
    assert not StableNames()(m).modified
    assert content(m) == before


def test_options_make_the_pass() -> None:
    assert StableNames() == StableNames()
    assert repr(StableNames()) == "StableNames()"
    assert StableNames().options() == {}
    assert (StableNames.name, StableNames.contract) == ("stable-names", "exact")
