"""TuckA's branches in ONNX Runtime: what the IR says, beside linears of every rank."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.errors import CheckpointError
from eptc.ir import Adapter, Branch, CentroidRouter, Constant, Routed, Tucker
from eptc.ir.folding import folded
from eptc.lower import insert_branches
from eptc.lower.constants import constant_value
from eptc.lower.half import plan_half
from eptc.lower.naming import CHOICE
from eptc.lower.quantizable import quantizable
from eptc.lower.weights import bound
from eptc.passes.cast_half import CastHalf
from eptc.passes.quantize_weights import QuantizeWeights
from eptc.passes.stable_names import StableNames
from eptc.tensors import ArrayTensor

Array = np.ndarray[Any, Any]
# x [batch, sequence, 5] is routed; the pooled row is a matrix, applied by a Gemm.
APPLIED = """
    t = Transpose<perm = [1, 0]>(first_weight)
    one = MatMul(x, t)
    pooled = Gather<axis = 1>(one, start)
    two = Gemm<transB = 1>(pooled, second_weight, second_bias)
"""
GRAPH = f"""
(float[batch, sequence, 5] x) => (float[batch, sequence, 4] one, float[batch, 3] two)
<int64 start = {{0}}> {{ {APPLIED} }}
"""
# The router's linear is called again, on a table that no input changes.
TABLE = """
(float[batch, sequence, 5] x)
    => (float[batch, sequence, 4] one, float[a, b, 4] table, float[batch, 3] two)
<int64 start = {0}, int64[1] zero = {0}> {
    t = Transpose<perm = [1, 0]>(first_weight)
    one = MatMul(x, t)
    scaled = LayerNormalization<axis = -1>(rows, scale)
    positions = Unsqueeze(scaled, zero)
    table = MatMul(positions, t)
    pooled = Gather<axis = 1>(one, start)
    two = Gemm<transB = 1>(pooled, second_weight, second_bias)
}
"""
WEIGHTS = {
    "first_weight": (4, 5),
    "second_weight": (3, 4),
    "second_bias": (3,),
    "rows": (7, 5),
    "scale": (5,),
}


class Model:
    """A graph with random weights, its adapters, and what they add up to."""

    def __init__(self, text: str, groups: int, experts: int, unit: Any) -> None:
        rng = np.random.default_rng(0)
        self.model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
        self.weights: dict[str, ArrayTensor] = {}
        for name, shape in WEIGHTS.items():
            own = name.replace("_", ".")
            self.weights[own] = ArrayTensor(own, rng.standard_normal(shape).astype(np.float32))
            value = ir.Value(name=own, const_value=bound(self.weights[own], own))
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
            uses = [
                (node, index)
                for node in self.model.graph
                for index, read in enumerate(node.inputs)
                if read is not None and read.name == name
            ]
            for node, index in uses:
                node.replace_input_with(index, value)
            if uses:
                self.model.graph.register_initializer(value)
        for node in self.model.graph:
            for value in node.outputs:
                if value.name == "pooled":  # a traced graph knows all its shapes
                    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["batch", 4])
        count = groups * experts
        self.router = CentroidRouter(
            ArrayTensor("e", rng.standard_normal((count, 5)).astype(np.float32)),
            groups, unit, "first",
        )  # fmt: skip
        self.adapters = {}
        for path in ("first", "second"):
            weight = self.weights[f"{path}.weight"]
            basis = ArrayTensor("u", rng.standard_normal((weight.shape[1], 2)).astype(np.float32))
            branches = [
                Branch(Tucker(basis, ArrayTensor("c", rng.standard_normal((2, 2))), weight),
                       Routed(self.router, expert), 1.5)
                for expert in range(count)
            ]  # fmt: skip
            self.adapters[path] = Adapter(path, tuple(branches))
        self.session: Any = None

    def lower(self) -> Counter[str]:
        insert_branches(self.model, self.adapters, self.weights)
        StableNames()(self.model)
        proto = ir.to_proto(self.model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return Counter(node.op_type for node in self.model.graph)

    def run(self, x: Array) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"x": x.astype(np.float32)}), strict=True))

    def weight(self, path: str, gates: Array) -> Array:
        """Return W + D [out, in] under some gates."""
        adapter = self.adapters[path]
        total = self.weights[f"{path}.weight"].numpy().astype(np.float64)
        for factor, branch in zip(
            adapter.factors(None, tuple(gates)), adapter.branches, strict=True
        ):
            total = total + factor * branch.delta.dense()
        return total


@pytest.mark.parametrize("unit", ["batch", "row"])
@pytest.mark.parametrize(("groups", "experts"), [(3, 2), (1, 3), (2, 1), (1, 1)])
def test_outputs(groups: int, experts: int, unit: str) -> None:
    model = Model(GRAPH, groups, experts, unit)
    operators = model.lower()
    assert not operators.keys() & {"If", "Loop", "GatherElements", "GatherND", "Where", "TopK"}
    assert ("ArgMax" in operators) is (groups > 1)
    rng = np.random.default_rng(1)
    for batch, length in ((1, 1), (1, 6), (4, 3)):
        x = rng.standard_normal((batch, length, 5))
        found = model.run(x)
        gates = model.router.gates(x)[:, 0]
        rows = np.broadcast_to(gates, (batch, groups * experts))
        one = np.stack([x[i] @ model.weight("first", rows[i]).T for i in range(batch)])
        bias = model.weights["second.bias"].numpy()
        two = np.stack(
            [one[i, 0] @ model.weight("second", rows[i]).T + bias for i in range(batch)]
        )
        np.testing.assert_allclose(found["one"], one, rtol=0, atol=5e-5)
        np.testing.assert_allclose(found["two"], two, rtol=0, atol=2e-4)


def test_experts_are_mixed_once_for_all_linears() -> None:
    model = Model(GRAPH, 3, 2, "batch")
    operators = model.lower()
    assert operators["Split"] == 1
    names = [node.name for node in model.model.graph]
    assert len(names) == len(set(names))
    assert "first.router.cores" in model.model.graph.initializers


def test_no_direction_gives_no_number() -> None:
    """Where the mean is zero every logit is, and the authors' code divides by their norm."""
    model = Model(GRAPH, 3, 2, "row")
    model.lower()
    x = np.ones((2, 4, 5))
    x[1, ::2] = -1
    found = model.run(x)["one"]
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    assert np.isnan(model.router.gates(x)[1]).any()


def test_a_call_on_a_constant_is_merged_into_the_weights() -> None:
    """The table's route holds for all that follows, whatever the input; the first call's not."""
    model = Model(TABLE, 3, 2, "batch")
    model.lower()
    weights = model.weights
    rows = weights["rows"].numpy().astype(np.float64)
    centred = rows - rows.mean(1, keepdims=True)
    table = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    table = (table * weights["scale"].numpy())[None]
    fixed = model.router.gates(table)[0, 0]
    x = np.random.default_rng(2).standard_normal((2, 3, 5))
    found = model.run(x)
    one = x @ model.weight("first", model.router.gates(x)[0, 0]).T
    bias: Any = weights["second.bias"].numpy()
    two = one[:, 0] @ model.weight("second", fixed).T + bias
    np.testing.assert_allclose(found["one"], one, rtol=0, atol=5e-5)
    np.testing.assert_allclose(
        found["table"], table @ model.weight("first", fixed).T, rtol=0, atol=5e-5
    )
    np.testing.assert_allclose(found["two"], two, rtol=0, atol=2e-4)
    initializers = model.model.graph.initializers
    assert {"first.weight", "first.merged.weight", "second.weight"} <= initializers.keys()
    assert "second.branch.basis" not in initializers
    merged = initializers["second.weight"].const_value
    assert merged is not None
    branches = tuple(
        Branch(branch.delta, Constant(float(gate)), branch.scale)
        for gate, branch in zip(fixed, model.adapters["second"].branches, strict=True)
    )
    exact = folded(weights["second.weight"], Adapter("second", branches), "float32")
    assert np.array_equal(merged.numpy(), exact.numpy())


def test_what_depends_on_an_input_is_no_constant() -> None:
    graph = Model(TABLE, 1, 1, "batch").model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    assert constant_value(values["one"]) is None
    assert constant_value(graph.inputs[0]) is None
    constant = constant_value(values["positions"])
    assert constant is not None
    assert constant.shape == (1, 7, 5)
    weight = graph.initializers["first.weight"]
    assert weight.dtype == ir.DataType.FLOAT
    assert constant_value(weight) is not None


def test_a_router_that_comes_later_is_refused() -> None:
    model = Model(GRAPH, 3, 2, "batch")
    router = CentroidRouter(ArrayTensor("e", np.ones((6, 4), np.float32)), 3, "batch", "second")
    model.adapters = {
        path: Adapter(
            path,
            tuple(Branch(b.delta, Routed(router, i), b.scale) for i, b in enumerate(a.branches)),
        )
        for path, a in model.adapters.items()
    }
    with pytest.raises(CheckpointError, match="first is executed before second"):
        model.lower()


@pytest.mark.parametrize("cores", ["first.router.cores", "first.router.centroids"])
def test_routes_stay_float32(cores: str, caplog: pytest.LogCaptureFixture) -> None:
    """Which group is chosen can turn on the last bit."""
    model = Model(GRAPH, 3, 2, "batch")
    model.lower()
    reasons: dict[str, str] = {}
    quantizable(model.model.graph, left=reasons.__setitem__)
    assert reasons[cores] == CHOICE
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_weights"):
        QuantizeWeights(bits=8, block_size=16)(model.model)
    assert f"left {cores} alone: {CHOICE}" in caplog.text
    plan = plan_half(model.model, "float16", {}, safety=8.0, keep=())
    nodes = [node for node in model.model.graph if str(node.name).startswith("first/router/")]
    assert len(nodes) > 10
    integers = {"ArgMax", "Equal"}
    assert {n.op_type for n in nodes if n not in plan.nodes} <= integers
    CastHalf("float16")(model.model)
    assert model.model.graph.initializers[cores].dtype == ir.DataType.FLOAT
    assert model.model.graph.initializers["first.weight"].dtype == ir.DataType.FLOAT16
