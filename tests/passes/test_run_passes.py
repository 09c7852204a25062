"""Running passes: what is checked after every pass, who is blamed, what is recorded."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir
import pytest

from eptc.errors import InternalError, ParityError
from eptc.ir import AdaptedModel, Constant
from eptc.linear_probe import LinearProbe
from eptc.pass_base import AdapterPass, Contract, GraphPass
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.pipeline import adapter_passes
from eptc.run_passes import check_graph, run_adapter_passes, run_graph_passes
from eptc.tensors import ArrayTensor

GRAPH = (
    '<ir_version: 10, opset_import: ["" : 20]> g (float[batch,3] x) => (float[batch,3] y) '
    "<float[3,3] W = {1, 2, 3, 4, 5, 6, 7, 8, 9}> { y = MatMul(x, W) }"
)


@dataclasses.dataclass(frozen=True)
class Guilty(AdapterPass):
    """A pass that does one wrong thing."""

    name: ClassVar[str] = "guilty"
    contract: ClassVar[Contract] = "exact"
    deed: str

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        if self.deed == "raise":
            raise KeyError("nothing here")
        if self.deed == "lose a weight":
            return model.replace(weights={"b.weight": model.weights["b.weight"]})
        if self.deed == "rename an adapter":
            return model.replace(adapters={"c": model.adapters["a"]})
        if self.deed == "fix the task, keep the gates":
            return model.replace(task_id=0)
        if self.deed == "reshape":
            other = ArrayTensor("a.weight", np.zeros((3, 3), np.float32))
            return model.replace(weights={**model.weights, "a.weight": other})
        if self.deed == "name no task":
            return model.replace(heads={"nobody": {}})
        adapter = model.adapters["a"]
        factor = {"scale": 1 + 1e-6, "drop": 0.0, "nan": float("nan")}[self.deed]
        branches = tuple(dataclasses.replace(b, scale=b.scale * factor) for b in adapter.branches)
        changed = dataclasses.replace(adapter, branches=branches)
        return model.replace(adapters={**model.adapters, "a": changed})


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("raise", "guilty failed: KeyError"),
        ("lose a weight", "guilty broke the model: the adapter at 'a' has no weight"),
        ("rename an adapter", "guilty broke the model: the adapter at 'c'"),
        ("fix the task, keep the gates", "guilty broke the model: .* PerTask gate left"),
        ("reshape", "guilty broke the model: .* does not fit"),
        ("name no task", "guilty broke the model: a head names"),
    ],
)
def test_a_pass_that_breaks_the_model_is_named(model: AdaptedModel, deed: str, words: str) -> None:
    with pytest.raises(InternalError, match=words):
        run_adapter_passes(model, [Guilty(deed)], task_id=0, probe=LinearProbe())


@pytest.mark.parametrize("deed", ["scale", "drop", "nan"])
def test_a_pass_that_moves_numbers_is_named(model: AdaptedModel, deed: str) -> None:
    """One part in a million of one linear's branches is too much for an exact pass."""
    with pytest.raises(ParityError, match="guilty is exact, but moved the output of a by"):
        run_adapter_passes(model, [Guilty(deed)], task_id=0, probe=LinearProbe())


def test_a_fold_that_is_off_by_float32_noise_is_caught(model: AdaptedModel) -> None:
    """After the fold one rounding of the weight is allowed, not two parts in a million."""
    fixed, _ = run_adapter_passes(model, adapter_passes(0)[:2], task_id=0, probe=LinearProbe())

    class Sloppy(FoldPyramid):
        name = "sloppy"

        def rewrite(self, model: AdaptedModel) -> AdaptedModel:
            folded = super().rewrite(model)
            weight = folded.weights["a.weight"].numpy().astype(np.float32) * np.float32(1 + 2e-6)
            changed = {**folded.weights, "a.weight": ArrayTensor("a.weight", weight)}
            return folded.replace(weights=changed)

    with pytest.raises(ParityError, match="sloppy is exact, but moved the output of a"):
        run_adapter_passes(fixed, [Sloppy()], task_id=0, probe=LinearProbe())


def test_records(model: AdaptedModel) -> None:
    """Sizes, contract and measured error of each pass; no clock in what is written."""
    done, records = run_adapter_passes(model, adapter_passes(0), task_id=0, probe=LinearProbe())
    assert [r.name for r in records] == ["specialize-router", "drop-dead-experts", "fold-pyramid"]
    assert [r.after["branches"] for r in records] == [6, 4, 0]
    assert all(r.error is not None and r.error <= 1 for r in records)
    assert records[2].error
    assert all("seconds" not in r.to_json() for r in records)
    assert all(isinstance(b.gate, Constant) for a in done.adapters.values() for b in a.branches)


@dataclasses.dataclass(frozen=True)
class GuiltyGraph(GraphPass):
    """A graph pass that does one wrong thing."""

    name: ClassVar[str] = "guilty-graph"
    contract: ClassVar[Contract] = "exact"
    deed: str

    def rewrite(self, model: onnx_ir.Model) -> int:
        node = next(iter(model.graph))
        if self.deed == "raise":
            raise ValueError("no")
        if self.deed == "unknown operator":
            node.op_type = "MatMull"
        elif self.deed == "wrong shapes":
            value = model.graph.initializers["W"]
            value.const_value = onnx_ir.tensor(np.zeros((2, 2), np.float32), name="W")
            value.shape = onnx_ir.Shape((2, 2))
        else:
            model.graph.inputs[0].name = "z"
        return 1


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("raise", "guilty-graph on model"),
        ("unknown operator", "guilty-graph on model broke the model: .* not valid ONNX"),
        ("wrong shapes", "guilty-graph on model broke the model: .* not valid ONNX"),
        ("rename an input", "guilty-graph changed the interface of model"),
    ],
)
def test_a_graph_pass_that_breaks_the_graph_is_named(deed: str, words: str) -> None:
    with pytest.raises(InternalError, match=words):
        run_graph_passes({"model": onnx_ir.from_onnx_text(GRAPH)}, [GuiltyGraph(deed)])


def test_check_reads_no_large_weight() -> None:
    """Large weights become inputs of the graph that is checked, whatever they hold."""

    def refuse() -> onnx_ir.TensorProtocol:
        raise AssertionError("read")

    numbers = ", ".join(["0"] * 900)
    text = GRAPH.replace("3,3", "30,30").replace("1, 2, 3, 4, 5, 6, 7, 8, 9", numbers)
    graph = onnx_ir.from_onnx_text(text.replace("batch,3", "batch,30"))
    graph.graph.initializers["W"].const_value = onnx_ir.LazyTensor(
        refuse, onnx_ir.DataType.FLOAT, onnx_ir.Shape((30, 30)), name="W"
    )
    check_graph(graph)
