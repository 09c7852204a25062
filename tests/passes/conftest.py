"""A small adapted model in the IR, made of arrays; small graphs, and how they run."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.ir import (
    AdaptedModel,
    Adapter,
    Branch,
    CellScaledLowRank,
    Kronecker,
    PerTask,
    Routed,
    TaskRouter,
    TokenRouter,
)
from eptc.lower.weights import bound
from eptc.lower.write import write
from eptc.tasks import Task
from eptc.tensors import Array, ArrayTensor, LazyTensor

SIZES = (2, 3, 4)


def tensor(rng: np.random.Generator, name: str, *shape: int) -> LazyTensor:
    return ArrayTensor(name, rng.standard_normal(shape).astype(np.float32))


def adapter(
    rng: np.random.Generator, path: str, out: int, columns: int, *, paper: bool
) -> Adapter:
    router = TaskRouter(
        tensor(rng, "G", len(SIZES), columns),
        None if paper else tensor(rng, "b", len(SIZES)),
        tensor(rng, "e", 2, columns),
        top_k=2,
        temperature=1.0,
        normalization="sum" if paper else "softmax",
    )
    a = tensor(rng, "A", 2, columns)
    b = tensor(rng, "B", out, 2)
    branches = []
    for e, s in enumerate(SIZES):
        shape = (s, s) if paper else (max(1, out // s), s)
        family = Kronecker if paper else CellScaledLowRank
        delta = family(a, b, tensor(rng, f"K{e}", *shape), out, columns)
        branches.append(Branch(delta, PerTask(router, e), 2.0))
    return Adapter(path, tuple(branches))


@pytest.fixture
def model() -> AdaptedModel:
    """Two linears (one of each variant), two tasks, one of them with a head."""
    rng = np.random.default_rng(0)
    return AdaptedModel(
        config={"model_type": "bert", "hidden_size": 12},
        weights={
            "a.weight": tensor(rng, "a.weight", 10, 12),
            "b.weight": tensor(rng, "b.weight", 7, 9),
            "head.weight": tensor(rng, "head.weight", 4, 10),
            "norm.weight": tensor(rng, "norm.weight", 10),
        },
        adapters={
            "a": adapter(rng, "a", 10, 12, paper=False),
            "b": adapter(rng, "b", 7, 9, paper=True),
        },
        heads={"first": {"head.weight": tensor(rng, "head.weight", 2, 10)}},
        tasks=(
            Task("first", "classification", labels=("no", "yes")),
            Task("second", "generation"),
        ),
    )


@pytest.fixture
def routed(model: AdaptedModel) -> AdaptedModel:
    """The same, the paper's linear routed by its input and the task."""
    rng = np.random.default_rng(1)
    before = model.adapters["b"]
    router = TokenRouter(
        tensor(rng, "W", len(SIZES), 9), tensor(rng, "e", 2, 9), None, 2, 1.0, "sum"
    )
    branches = tuple(
        dataclasses.replace(branch, gate=Routed(router, e))
        for e, branch in enumerate(before.branches)
    )
    return model.replace(adapters={**model.adapters, "b": Adapter("b", branches)})


@dataclasses.dataclass(frozen=True)
class Run:
    """What ONNX Runtime makes of a graph: its outputs, and the operators it really runs."""

    outputs: dict[str, Array]
    operators: collections.Counter[str]


@pytest.fixture
def weighted() -> Callable[..., ir.Model]:
    """Return a function that builds a graph from text and binds the weights it names."""

    def build(text: str, weights: Mapping[str, Array]) -> ir.Model:
        model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {text}')
        for name, array in weights.items():
            value = ir.Value(name=name, const_value=bound(ArrayTensor(name, array), name))
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
            model.graph.register_initializer(value)
            for node in ir.traversal.RecursiveGraphIterator(model.graph):
                for index, read in enumerate(node.inputs):
                    if read is not None and read.name == name:
                        node.replace_input_with(index, value)
        return model

    return build


@pytest.fixture
def run_ort(tmp_path: Path) -> Callable[..., Run]:
    """Return a function that writes a graph, loads it in ONNX Runtime and runs it."""

    def run(model: ir.Model, feeds: Mapping[str, Array]) -> Run:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        write({"model": model}, folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        optimized = onnx.load(folder / "optimized.onnx", load_external_data=False)
        return Run(
            dict(zip(names, session.run(names, dict(feeds)), strict=True)),
            collections.Counter(node.op_type for node in optimized.graph.node),
        )

    return run
