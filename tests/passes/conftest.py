"""A small adapted model in the IR; small graphs and whole models, and how they run."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc import lower
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
from eptc.lower.quantizable import quantized_inputs
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
    return graph_of


def graph_of(text: str, weights: Mapping[str, Array]) -> ir.Model:
    """Build a graph from text; weights are lazy."""
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


# Output -> input and weight (turned?) of its product; None: rows of a table.
Products = Mapping[str, tuple[str, str, bool] | None]
_INPUTS = "(float[b,s,32] x, float[3,b,4,32] z, float[b,32] f, int64[b,s] ids)"
_PRODUCTS: dict[str, tuple[str, Products]] = {
    "bias": (
        "(float[b,s,48] y) { p = MatMul(x, W) y = Add(p, b) }",
        {"y": ("x", "W", False)},
    ),
    "batch dims": ("(float[3,b,4,48] y) { y = MatMul(z, W) }", {"y": ("z", "W", False)}),
    "one activation, two weights": (
        "(float[b,s,48] y, float[b,s,48] w) "
        "{ y = MatMul(x, W) t = Transpose <perm = [1, 0]> (V) p = MatMul(x, t) w = Add(p, b) }",
        {"y": ("x", "W", False), "w": ("x", "V", True)},
    ),
    "two activations, one weight": (
        "(float[b,s,48] y, float[3,b,4,48] w) { y = MatMul(x, W) w = MatMul(z, W) }",
        {"y": ("x", "W", False), "w": ("z", "W", False)},
    ),
    "Gemm": (
        "(float[b,48] y) { y = Gemm <transB = 1> (f, V, b) }",
        {"y": ("f", "V", True)},
    ),
    "Gemm without bias": ("(float[b,48] y) { y = Gemm(f, W) }", {"y": ("f", "W", False)}),
    "table": ("(float[b,s,32] e) { e = Gather(E, ids) }", {"e": None}),
    "tied": (
        "(float[b,s,32] e, float[b,s,70] y) "
        "{ e = Gather(E, ids) t = Transpose(E) y = MatMul(x, t) }",
        {"e": None, "y": ("x", "E", True)},
    ),
    "tied Gemm": (
        "(float[b,s,32] e, float[b,70] y) { e = Gather(E, ids) y = Gemm <transB = 1> (f, E) }",
        {"e": None, "y": ("f", "E", True)},
    ),
    "a chain": (
        "(float[b,s,48] y, float[b,s,48] w) "
        "{ p = MatMul(x, I) y = MatMul(p, W) e = Gather(E, ids) w = MatMul(e, W) }",
        {},
    ),
}


class SmallProducts:
    """Graphs of products and tables that int8 passes rewrite, by what they show.

    Attributes:
        weights: columns of very different sizes, one of zeros.
        feeds: what the graphs read.
        ranges: of what is multiplied.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights: dict[str, Array] = {
            name: (
                rng.normal(size=size) * np.geomspace(1e-3, 10, size[axis]).reshape(shape)
            ).astype("f")
            for name, size, axis, shape in (
                ("W", (32, 48), 1, (1, -1)),
                ("V", (48, 32), 0, (-1, 1)),
                ("E", (70, 32), 0, (-1, 1)),
                ("b", (48,), 0, (-1,)),
            )
        }
        for name in "WVE":
            self.weights[name][(slice(None), 5) if name == "W" else 5] = 0
        self.weights["I"] = np.eye(32, dtype="f")
        self.feeds: dict[str, Array] = {
            "x": (rng.normal(size=(2, 5, 32)) + 1).astype("f"),
            "z": np.abs(rng.normal(size=(3, 2, 4, 32)) + 5).astype("f"),
            "f": rng.normal(size=(3, 32)).astype("f"),
            "ids": rng.integers(0, 70, size=(2, 5)),
        }
        self.ranges = {
            name: (float(array.min()), float(array.max()))
            for name, array in (
                *((name, self.feeds[name]) for name in "xzf"),
                ("p", self.feeds["x"]),
                ("e", self.weights["E"]),
            )
        }

    def model(self, what: str) -> ir.Model:
        """Build a graph."""
        return self.graph(_PRODUCTS[what][0])

    def graph(self, body: str) -> ir.Model:
        """Build a graph of outputs and nodes."""
        words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
        used = {name: array for name, array in self.weights.items() if name in words}
        return graph_of(f"{_INPUTS} => {body}", used)

    def given(self, model: ir.Model) -> dict[str, Array]:
        """Return what a graph reads."""
        return {str(v.name): self.feeds[str(v.name)] for v in model.graph.inputs}

    def products(self, what: str) -> Products:
        """Return what each output is the product of."""
        return _PRODUCTS[what][1]

    def bound(self, product: tuple[str, str, bool] | None, *, symmetric: bool = False) -> Array:
        """Return how far each output may move.

        The activation moves by a step at most (half of it, and half for its zero point), the
        weight by half of one; float32 sums them up to 2**-20 of the terms.
        """
        if product is None:
            step = np.abs(self.weights["E"]).max(1) / 127
            step[step == 0] = 1
            rows: Array = step[self.feeds["ids"]][..., None] * 0.5001
            return rows
        x, weight = self.feeds[product[0]], self.weights[product[1]]
        weight = weight.T if product[2] else weight
        step = np.abs(weight).max(0) / 127
        unit = (max(x.max(), 0) - min(x.min(), 0)) / 255
        if symmetric:
            unit = np.abs(x).max() / 127 / 2
        terms = np.abs(x) @ np.abs(weight)
        moved: Array = (
            unit * (np.abs(weight) + step / 2).sum(0)
            + np.abs(x).sum(-1, keepdims=True) * step / 2
            + 2.0**-20 * (terms + 10)
        )
        return moved


@pytest.fixture(scope="session")
def small() -> SmallProducts:
    """Small graphs of products and tables."""
    return SmallProducts()


Graphs = dict[str, ir.Model]


def _config(name: str) -> Any:
    from transformers import BertConfig, LlamaConfig, RobertaConfig, T5Config

    encoder = {
        "vocab_size": 80, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "num_labels": 3, "max_position_embeddings": 64,
    }  # fmt: skip
    t5 = {"vocab_size": 80, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16}
    if name == "bert":
        return BertConfig(**encoder)
    if name == "roberta":
        return RobertaConfig(**encoder)
    if name == "t5":
        return T5Config(**t5)
    if name == "gated-t5":
        return T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    groups = 2 if name == "grouped-llama" else 4
    tied = name == "tied-llama"
    return LlamaConfig(**encoder, num_key_value_heads=groups, tie_word_embeddings=tied)


@pytest.fixture(scope="session")
def whole_model() -> Callable[[str], Graphs]:
    """Return a function that gives the bound graphs of a model with random weights, by name."""
    traced: dict[str, Any] = {}

    def build(name: str) -> Graphs:
        if name not in traced:
            config = _config(name)
            rng = np.random.default_rng(0)
            weights = {
                key: ArrayTensor(key, rng.normal(size=size, scale=0.2).astype(np.float32))
                for key, size in lower.expected_parameters(config).items()
            }
            traced[name] = lower.trace(config), weights
        skeleton, weights = traced[name]
        graphs = {key: model.clone() for key, model in skeleton.items()}
        lower.bind(graphs, weights)
        return graphs

    return build


@pytest.fixture(scope="session")
def sessions() -> Callable[[Graphs, Path], dict[str, Any]]:
    """Return a function that writes graphs to a new folder and opens them in ONNX Runtime."""
    return open_sessions


def open_sessions(graphs: Graphs, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    write(graphs, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        key: onnxruntime.InferenceSession(
            str(folder / f"{key}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for key in graphs
    }


@pytest.fixture(scope="session")
def first_step() -> Callable[..., dict[str, Array]]:
    """Return a function that gives everything a model puts out on two rows of five tokens.

    What an encoder caches goes to its decoder. `taps` are further values, by graph.
    """

    def run(
        graphs: Graphs, folder: Path, taps: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, Array]:
        for key, names in (taps or {}).items():
            values = ir.convenience.create_value_mapping(graphs[key].graph)
            graphs[key].graph.outputs.extend(values[name] for name in names)
        ids = np.random.default_rng(1).integers(3, 80, size=(2, 5))
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        given: dict[str, Array] = {
            "input_ids": ids, "token_type_ids": ids % 2, "attention_mask": mask,
            "encoder_attention_mask": mask, "position_ids": np.tile(np.arange(5), (2, 1)),
        }  # fmt: skip
        found: dict[str, Array] = {}
        for key, session in open_sessions(graphs, folder).items():
            feeds = {
                spec.name: given[spec.name]
                if spec.name in given
                else np.zeros((2, spec.shape[1], 0, spec.shape[3]), np.float32)
                for spec in session.get_inputs()
            }
            names = [output.name for output in session.get_outputs()]
            made = dict(zip(names, session.run(names, feeds), strict=True))
            given |= {name.replace("present.", "past_key_values."): a for name, a in made.items()}
            found |= {f"{key}:{name}": array for name, array in made.items()}
        return found

    return run


@pytest.fixture(scope="session")
def seen_ranges(first_step: Any) -> Callable[[Graphs, Path], dict[str, Any]]:
    """Return a function that gives, by graph, the ranges of what `quantized_inputs` names."""

    def observe(graphs: Graphs, folder: Path) -> dict[str, Any]:
        taps = {key: quantized_inputs(model.graph) for key, model in graphs.items()}
        new = {
            key: [n for n in names if n not in {o.name for o in graphs[key].graph.outputs}]
            for key, names in taps.items()
        }
        seen = first_step(graphs, folder, new)
        return {
            key: {n: (seen[f"{key}:{n}"].min(), seen[f"{key}:{n}"].max()) for n in names}
            for key, names in taps.items()
        }

    return observe


@pytest.fixture
def stop_fusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which sessions fuse nothing: ONNX Runtime takes fp8 for int8."""
    session_options = onnxruntime.SessionOptions

    def unfused() -> Any:
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return options

    return lambda: monkeypatch.setattr(onnxruntime, "SessionOptions", unfused)
