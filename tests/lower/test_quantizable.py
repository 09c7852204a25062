"""Which weights can be integers: names, readers, shapes, and why the others cannot."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from eptc.lower.quantizable import quantizable, quantized_inputs
from eptc.lower.weights import bound
from eptc.tensors import ArrayTensor

SIZES = {
    "W": (32, 48), "V": (48, 32), "E": (64, 32), "few": (63, 32), "thin": (32, 15),
    "narrow": (64, 15), "cube": (2, 32, 48), "a.w+b.w": (32, 48), "v": (48,), "Half": (32, 48),
}  # fmt: skip
WHOLE = "float[b,s,32] x"
FINDS = {
    "MatMul": ("y = MatMul(x, W)", [("W", 1, 0, 1)]),
    "read twice": ("y = MatMul(x, W) z = MatMul(x, W)", [("W", 1, 0, 2)]),
    "transposed": ("t = Transpose <perm = [1, 0]> (V) y = MatMul(x, t)", [("V", 0, 0, 1)]),
    "transposed by default": ("t = Transpose (V) y = MatMul(x, t)", [("V", 0, 0, 1)]),
    "table": ("y = Gather(E, ids)", [("E", 0, 1, 0)]),
    "tied": ("e = Gather(E, ids) t = Transpose(E) y = MatMul(e, t)", [("E", 0, 1, 1)]),
    "Gemm": ("y = Gemm <transB = 1> (f, V, v)", [("V", 0, 0, 1)]),
    "Gemm as it is": ("y = Gemm(f, W)", [("W", 1, 0, 1)]),
    "packed": ("y = MatMul(x, P)", [("a.w+b.w", 1, 0, 1)]),
}
LEAVES = {
    "vector": ("y = Add(x, v)", "no matrix"),
    "cube": ("y = MatMul(x, cube)", "no matrix"),
    "half": ("h = Cast <to = 1> (Half) y = MatMul(x, h)", "not float32"),
    "thin": ("y = MatMul(x, thin)", "it is small: 32 x 15"),
    "narrow table": ("y = Gather(narrow, ids)", "it is small"),
    "few rows": ("y = Gather(few, ids)", "it is a table of 63 rows"),
    "columns": ("y = Gather <axis = 1> (E, ids)", "Gather reads it"),
    "on the left": ("t = Transpose <perm = [0, 2, 1]> (x) y = MatMul(V, t)", "MatMul reads it"),
    "computed": ("n = Neg(W) y = MatMul(x, n)", "Neg reads it"),
    "read elsewhere": ("y = MatMul(x, W) z = Neg(W)", "Neg reads it"),
    "turned for others": ("t = Transpose(V) y = MatMul(x, t) z = Neg(t)", "than a product"),
    "not turned": ("t = Transpose <perm = [0, 1]> (W) y = MatMul(x, t)", "Transpose reads it"),
    "both ways": ("e = Gather(Q, ids) y = MatMul(e, Q)", "by rows and by columns"),
    "scaled Gemm": ("y = Gemm <alpha = 2.0> (f, W)", "Gemm reads it"),
    "turned Gemm": ("y = Gemm <transA = 1> (f, W)", "Gemm reads it"),
    "two weights": ("y = MatMul(R, W)", "no activation"),
    "vector times": ("y = MatMul(u, W)", "no float32 matrix"),
    "double": ("y = MatMul(d, W)", "no float32 matrix"),
    "subgraph": (
        "y = If (c) <then_branch = g () => (float[b,s,48] p) { p = MatMul(x, W) }, "
        "else_branch = h () => (float[b,s,48] p) { p = MatMul(x, W) }>",
        "a subgraph reads it",
    ),
    "unread": ("y = Neg(x)", "nothing reads it"),
}  # fmt: skip


def graph(body: str, *names: str) -> ir.Graph:
    inputs = (
        f"({WHOLE}, float[b,32] f, float[32] u, double[b,32] d, int64[b,s] ids, bool c) "
        "=> (float[*] y)"
    ).replace("[*]", "")
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {inputs} {{ {body} }}')
    sizes = {**SIZES, "Q": (64, 64), "R": (32, 32), "P": SIZES["a.w+b.w"]}
    read = {
        str(value.name)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        for value in node.inputs
        if value is not None
    }
    for name in sorted(read.intersection(sizes) | set(names)):
        dtype = np.float16 if name == "Half" else np.float32
        tensor = bound(ArrayTensor(name, np.ones(sizes[name], dtype)), name)
        if tensor.origin is not None:
            tensor = tensor.origin
        value = ir.Value(name="a.w+b.w" if name == "P" else name, const_value=tensor)
        value.dtype, value.shape = tensor.dtype, ir.Shape(sizes[name])
        model.graph.register_initializer(value)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
    return model.graph


@pytest.mark.parametrize(("body", "want"), FINDS.values(), ids=FINDS)
def test_finds(body: str, want: list[tuple[str, int, int, int]]) -> None:
    found = quantizable(graph(body))
    assert [(s.weight.name, s.axis, len(s.gathers), len(s.products)) for s in found] == want


@pytest.mark.parametrize(("body", "reason"), LEAVES.values(), ids=LEAVES)
def test_leaves(body: str, reason: str) -> None:
    """No weight is found, and at least one is left for this reason."""
    left: dict[str, str] = {}
    made = graph(body, *(["W"] if body == "y = Neg(x)" else []))
    assert quantizable(made, left=left.__setitem__) == []
    assert any(reason in said for said in left.values()), left


def test_constants_are_no_weights() -> None:
    made = graph("y = MatMul(x, W)")
    made.initializers["W"].const_value = ir.tensor(np.ones((32, 48), np.float32))
    left: dict[str, str] = {}
    assert quantizable(made, left=left.__setitem__) == []
    assert left == {}


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_leaves_what_a_caller_sees(side: str) -> None:
    made = graph("y = MatMul(x, W)")
    getattr(made, side).append(made.initializers["W"])
    left: dict[str, str] = {}
    assert quantizable(made, left=left.__setitem__) == []
    assert left == {"W": "a caller can set or read it"}


def test_a_transpose_that_a_caller_reads() -> None:
    made = graph("t = Transpose(V) y = MatMul(x, t)")
    made.outputs.append(made[0].outputs[0])
    assert quantizable(made) == []


@pytest.mark.parametrize(
    ("keep", "only", "found"),
    [
        ((), None, ["W", "a.w+b.w"]),
        (("W",), None, ["a.w+b.w"]),
        (("b.w",), None, ["W"]),
        (("a.w+b.w", "other"), None, ["W"]),
        ((), (), []),
        ((), ("W", "other"), ["W"]),
        ((), ("a.w",), []),
        ((), ("a.w", "b.w"), ["a.w+b.w"]),
        ((), ("a.w+b.w",), ["a.w+b.w"]),
        (("W",), ("W",), []),
    ],
)
def test_keep_and_only(
    keep: tuple[str, ...], only: tuple[str, ...] | None, found: list[str]
) -> None:
    """Parameters by name; a packed weight stays with any part, and goes with all of them."""
    made = graph("y = MatMul(x, W) z = MatMul(x, P)")
    assert sorted(str(s.weight.name) for s in quantizable(made, keep=keep, only=only)) == found


def test_quantized_inputs() -> None:
    """Each activation once, in the graph's order; tables have none."""
    made = graph(
        "e = Gather(E, ids) n = Neg(x) y = MatMul(n, W) z = MatMul(x, W) p = MatMul(n, P)"
    )
    assert quantized_inputs(made) == ["n", "x"]
    assert quantized_inputs(made, keep=("W",)) == ["n"]
    assert quantized_inputs(made, only=("E",)) == []
