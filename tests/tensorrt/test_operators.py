"""What TensorRT takes, by its version; graphs it does not take, and who made them so."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx
import onnx_ir as ir
import pytest

from eptc.errors import OptionError
from eptc.lower.edit import insert, replace
from eptc.pass_base import Contract, GraphPass
from eptc.run_passes import run_graph_passes
from eptc.tensorrt.operators import check_graphs, listed, parse_version

NEWEST = parse_version(None)


def graph(body: str, inputs: str = "float[n] x", output: str = "float[n] y", opset: int = 20,
          more: str = "") -> ir.Model:  # fmt: skip
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
        f"g ({inputs}) => ({output}) {more} {{ {body} }}"
    )


@pytest.mark.parametrize(
    ("text", "want"),
    [(None, (10, 15)), ("10.0", (10, 0)), ("10.3", (10, 3)), ("10.15.1.29", (10, 15)),
     ("11.2", (11, 2))],
)  # fmt: skip
def test_versions(text: str | None, want: tuple[int, int]) -> None:
    assert parse_version(text) == want


@pytest.mark.parametrize(
    ("text", "words"), [("8.6", "not known"), ("9.3.0", "not known"), ("ten", "is 'ten'"),
                        ("10", "is '10'"), ("10.x", "is '10.x'")]
)  # fmt: skip
def test_versions_that_are_none(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_version(text)


def test_operators_come_with_versions() -> None:
    """What a later version brought is not in an earlier one; of newer ones the newest is known."""
    for name, first in (
        ("RMSNormalization", (10, 15)),
        ("Attention", (10, 14)),
        ("STFT", (10, 5)),
    ):
        assert name in listed(first).types
        assert name not in listed((first[0], first[1] - 1)).types
    assert listed((11, 2)).types == listed(NEWEST).types
    assert listed((11, 2)).name == "11.2 (by the list of 10.15)"
    assert (listed((10, 0)).opset, listed((10, 14)).opset, listed((10, 15)).opset) == (20, 20, 24)


def test_the_list_is_of_operators() -> None:
    """Every name is one of ONNX, but for what its parser takes of early opsets."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    early = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
    assert set(listed(NEWEST).types) - known <= early
    for name in (
        "MatMulInteger",
        "DynamicQuantizeLinear",
        "QLinearMatMul",
        "SequenceAt",
        "Unique",
    ):
        assert name not in listed(NEWEST).types


TAKEN = {
    "floats": graph("y = Add(x, x)"),
    "where": graph("c = Less(x, x) y = Where(c, x, x)"),
    "integer shapes": graph("s = Shape(x) y = Expand(x, s)"),
    "quantized": graph(
        "q = QuantizeLinear(x, scale, zero) y = DequantizeLinear(q, scale, zero)",
        more="<float scale = {0.5}, int8 zero = {0}>",
    ),
    "axes": graph("y = ReduceMean(x, axes)", output="float[1] y", more="<int64[1] axes = {0}>"),
    "axes of a Constant": graph(
        "axes = Constant<value_ints = [0]>() y = ReduceMean(x, axes)", output="float[1] y"
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str) -> None:
    check_graphs({"model": TAKEN[case]}, NEWEST)


REFUSED = {
    "domain": (graph("y = com.microsoft.FastGelu(x)"), "com.microsoft::FastGelu: no standard"),
    "no such operator": (
        graph("y, i, j, k = Unique(x)"), "is Unique: its parser has no such operator"
    ),
    "type": (
        graph("y = Clip(x)", "int64[n] x", "int64[n] y"), "INT64 is not among its types, BF16"
    ),
    "double": (graph("y = Add(x, x)", "double[n] x", "double[n] y"), "DOUBLE is not among"),
    "data of Where": (
        graph("y = Where(c, x, x)", "bool[n] c, double[n] x", "double[n] y"), "DOUBLE is not among"
    ),
    "uint8": (
        graph(
            "q = QuantizeLinear(x, scale, zero) y = DequantizeLinear(q, scale, zero)",
            more="<float scale = {0.5}, uint8 zero = {0}>",
        ),
        "DequantizeLinear: UINT8 is not among",
    ),
    "zero point": (
        graph(
            "q = QuantizeLinear(x, scale, zero) y = DequantizeLinear(q, scale, zero)",
            more="<float scale = {0.5}, int8 zero = {3}>",
        ),
        "its zero point is not 0",
    ),
    "zero point of what is stored": (
        graph(
            "y = DequantizeLinear(w, scale, zero)", output="float[2] y",
            more="<int8[2] w = {1, 2}, float scale = {0.5}, int8 zero = {3}>",
        ),
        "its zero point is not 0",
    ),
    "what ConstantOfShape makes": (
        graph(
            "s = Shape(x) y = ConstantOfShape<value = double[1] {1}>(s)", output="double[n] y"
        ),
        "DOUBLE is not among",
    ),
    "computed axes": (
        graph("y = ReduceMean(x, axes)", "float[n] x, int64[1] axes", "float[1] y"),
        "input 1 is not known when the engine is built",
    ),
    "computed axis": (
        graph("y = CumSum(x, axis)", "float[n] x, int64 axis"),
        "is CumSum: input 1 is not known when the engine is built",
    ),
    "loop": (
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[n] x) => (float[n] y) '
            "{ y = If (c) <then_branch = a () => (float[n] t) { t = Identity(x) }, "
            "else_branch = b () => (float[n] e) { e = Neg(x) }> }"
        ),
        "is If: control flow",
    ),
    "opset": (graph("y = Add(x, x)", opset=25), "has opset 25"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """The graph, the operator and who made it are named."""
    model, words = REFUSED[case]
    with pytest.raises(OptionError) as caught:
        check_graphs({"decoder": model}, NEWEST)
    assert words in str(caught.value)
    assert "'decoder'" in str(caught.value)
    if case != "opset":
        assert "which the trace made" in str(caught.value)


def test_refused_by_an_earlier_version() -> None:
    model = graph("y = STFT(x, step, x)", "float[n] x, int64 step")
    check_graphs({"model": model}, (10, 5))
    with pytest.raises(OptionError, match=r"TensorRT 10\.4 does not take graph 'model'"):
        check_graphs({"model": model}, (10, 4))


@dataclasses.dataclass(frozen=True)
class Insert(GraphPass):
    """Put an operator of ONNX Runtime's own behind every Relu, or turn the Relu into one."""

    name: ClassVar[str] = "insert-gelu"
    contract: ClassVar[Contract] = "exact"
    renames: bool = False

    def rewrite(self, model: ir.Model) -> int:
        found = [node for node in model.graph if node.op_type == "Relu"]
        for node in found:
            if self.renames:
                node.op_type, node.domain = "FastGelu", "com.microsoft"
                continue
            follower = next(use for use, _ in node.outputs[0].uses())
            gelu = insert(follower, "FastGelu", [node.outputs[0]], domain="com.microsoft")
            replace(node.outputs[0], gelu.outputs[0])
            gelu.replace_input_with(0, node.outputs[0])
        return len(found)


@dataclasses.dataclass(frozen=True)
class Nothing(GraphPass):
    """Change nothing."""

    name: ClassVar[str] = "nothing"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: ir.Model) -> int:  # noqa: ARG002
        return 0


@pytest.mark.parametrize("renames", [False, True])
def test_the_pass_is_named(renames: bool) -> None:
    """Whether it made the node or changed its operator; not the pass before or after it."""
    model = graph("a = Relu(x) y = Neg(a)")
    steps = [Nothing(), Insert(renames), Nothing()]
    run_graph_passes({"model": model}, steps, {"insert-gelu": "odd 1.2"})
    with pytest.raises(OptionError, match=r"which the pass insert-gelu of odd 1\.2 made"):
        check_graphs({"model": model}, NEWEST)
