"""Writing: one file of weights, each once, aligned, streamed, readable by everyone."""

from __future__ import annotations

import functools
import gc
import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.errors import CheckpointError, InternalError
from eptc.lower import WeightsFile, bind, write
from eptc.lower.weights import derive
from eptc.run_passes import check_graph
from eptc.tensors import Array, ArrayTensor, ComputedTensor, LazyTensor


def model_of(*names: str, shape: tuple[int, ...] = (64, 64)) -> ir.Model:
    """Return a graph that sums the named weights."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    values = [ir.Value(name=name, shape=ir.Shape(shape), type=kind) for name in names]
    total = ir.node("Sum", values)
    total.outputs[0].name, total.outputs[0].type = "y", kind
    total.outputs[0].shape = ir.Shape(shape)
    graph = ir.Graph([], total.outputs, nodes=[total], name="g", opset_imports={"": 20})
    for value in values:
        graph.initializers.add(value)
    return ir.Model(graph, ir_version=10)


def entries(path: Path) -> dict[str, dict[str, str]]:
    """Return name -> location, offset, length of a graph's external weights."""
    proto = onnx.load(path, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.external_data
    }


def evaluate(path: Path) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


def test_graphs_share_the_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights: dict[str, LazyTensor] = {
        name: ArrayTensor(name, rng.normal(size=(64, 64)).astype(np.float32)) for name in "abc"
    }
    graphs = {"first": model_of("a", "b"), "second": model_of("c", "b")}
    bind(graphs, weights)
    digests = write(graphs, tmp_path)
    assert list(digests) == ["weights.bin", "first.onnx", "second.onnx"]
    paths = [tmp_path / name for name in digests]
    for path in paths:
        assert digests[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    first, second = entries(paths[1]), entries(paths[2])
    assert first["b"] == second["b"]
    assert paths[0].stat().st_size == 3 * 64 * 64 * 4
    for path, names in ((paths[1], "ab"), (paths[2], "cb")):
        onnx.checker.check_model(path, full_check=True)
        wanted = sum(weights[name].numpy() for name in names)
        np.testing.assert_array_equal(evaluate(path), wanted)
        assert len(onnx.load(path).graph.initializer) == 2


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    same = ArrayTensor("w", np.ones((64, 64), np.float32))
    graphs = {"model": model_of("a", "b")}
    bind(graphs, {"a": same, "b": same})
    write(graphs, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 64 * 64 * 4


@pytest.mark.parametrize(
    ("shape", "alignment"), [((128, 128), 4096), ((127, 129), 64), ((20, 20), 64)]
)
def test_alignment(tmp_path: Path, shape: tuple[int, ...], alignment: int) -> None:
    graphs = {"model": model_of("a", "b", "c", shape=shape)}
    bind(graphs, {name: ArrayTensor(name, np.ones(shape, np.float32)) for name in "abc"})
    write(graphs, tmp_path)
    offsets = [int(entry["offset"]) for entry in entries(tmp_path / "model.onnx").values()]
    assert len(set(offsets)) == 3
    assert all(offset % alignment == 0 for offset in offsets)


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    graphs = {"model": model_of("a", shape=(16, 16))}
    bind(graphs, {"a": ArrayTensor("a", np.ones((16, 16), np.float32))})
    write(graphs, tmp_path)
    assert entries(tmp_path / "model.onnx") == {}
    np.testing.assert_array_equal(evaluate(tmp_path / "model.onnx"), np.ones((16, 16)))


def test_small_tensors_that_are_to_be_outside(tmp_path: Path) -> None:
    graphs = {"model": model_of("a", "b", shape=(4, 4))}
    arrays = {"a": np.ones((4, 4), np.float32), "b": np.full((4, 4), 2, np.float32)}
    bind(graphs, {name: ArrayTensor(name, array) for name, array in arrays.items()})
    written = WeightsFile.write(graphs, tmp_path, outside=frozenset("b"))
    written.write_graph(graphs["model"], tmp_path / "model.onnx")
    assert list(entries(tmp_path / "model.onnx")) == ["b"]
    offset = written.offset(graphs["model"].graph.initializers["b"])
    found = np.fromfile(tmp_path / "weights.bin", np.float32, 16, offset=offset)
    np.testing.assert_array_equal(found.reshape(4, 4), arrays["b"])
    np.testing.assert_array_equal(evaluate(tmp_path / "model.onnx"), arrays["a"] + arrays["b"])


def test_same_bytes_and_graphs_untouched(tmp_path: Path) -> None:
    graphs = {"model": model_of("a", "b")}
    bind(graphs, {name: ArrayTensor(name, np.ones((64, 64), np.float32)) for name in "ab"})
    before = {n: v.const_value for n, v in graphs["model"].graph.initializers.items()}
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written = write(graphs, tmp_path / name)
        contents.append([(tmp_path / name / file).read_bytes() for file in written])
    assert contents[0] == contents[1]
    assert {n: v.const_value for n, v in graphs["model"].graph.initializers.items()} == before


@pytest.mark.parametrize("threads", [1, 3])
def test_one_large_tensor_at_a_time(tmp_path: Path, threads: int) -> None:
    """The tensor before is gone when the next one is made, also where one is transposed."""
    alive: list[weakref.ref[Any]] = []

    def compute() -> Array:
        gc.collect()
        assert [ref() for ref in alive if ref() is not None] == []
        array = np.ones((256, 128), np.float32)
        alive.append(weakref.ref(array))
        return array

    graphs = {"model": model_of("a", "b", "c", shape=(256, 128))}
    bind(graphs, {n: ComputedTensor(n, "float32", (256, 128), compute) for n in "abc"})
    value = graphs["model"].graph.initializers["b"]
    assert value.const_value is not None
    value.const_value = derive(value.const_value, "t", np.transpose, shape=(128, 256))
    write(graphs, tmp_path, threads=threads, in_flight=0)
    assert len(alive) == 3


def test_tensors_ahead_are_bounded(tmp_path: Path) -> None:
    """While one is written the next are computed, as many as may be in memory."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    def compute() -> Array:
        nonlocal most
        array = np.ones((256, 128), np.float32)
        alive.append(weakref.ref(array))
        most = max(most, sum(ref() is not None for ref in alive))
        return array

    names = "abcdefghij"
    graphs = {"model": model_of(*names, shape=(256, 128))}
    bind(graphs, {n: ComputedTensor(n, "float32", (256, 128), compute) for n in names})
    write(graphs, tmp_path, threads=4, in_flight=3 * 256 * 128 * 4)
    assert len(alive) == 10
    assert most <= 3


def test_an_error_ends_it(tmp_path: Path) -> None:
    """The error of a thread is raised, and what was not begun is left."""
    computed: list[str] = []

    def compute(name: str) -> Array:
        computed.append(name)
        if name == "b":
            raise OSError("gone")
        return np.ones((256, 128), np.float32)

    names = [f"{letter}{i}" for i in range(50) for letter in "a"]
    names[3] = "b"
    graphs = {"model": model_of(*names, shape=(256, 128))}
    bind(
        graphs,
        {
            n: ComputedTensor(n, "float32", (256, 128), functools.partial(compute, n))
            for n in names
        },
    )
    with pytest.raises(OSError, match="gone"):
        write(graphs, tmp_path, threads=2)
    assert len(computed) < 20


@pytest.mark.parametrize("error", [CheckpointError("w overflows"), MemoryError("w is large")])
@pytest.mark.parametrize("shape", [(2, 2), (64, 64)], ids=["in the graph", "outside"])
def test_what_computing_a_weight_raises(
    tmp_path: Path, shape: tuple[int, ...], error: Exception
) -> None:
    """It comes out as it is, from wherever the numbers go."""

    def refuse() -> Array:
        raise error from ZeroDivisionError()

    model = model_of("w", shape=shape)
    bind({"model": model}, {"w": ComputedTensor("w", "float32", shape, refuse)})
    with pytest.raises(type(error), match=r"^w ") as raised:
        write({"model": model}, tmp_path)
    assert raised.value is error
    assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, ml_dtypes.int4])
def test_other_types(tmp_path: Path, dtype: Any) -> None:
    """What a later pass casts or quantizes a weight to."""
    array = (np.arange(64 * 64) % 7).reshape(64, 64).astype(np.float32)
    model = model_of("a")
    bind({"model": model}, {"a": ArrayTensor("a", array)})
    value = model.graph.initializers["a"]
    assert value.const_value is not None
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    value.const_value = derive(
        value.const_value, "cast", lambda array: array.astype(dtype), dtype=kind
    )
    value.type = ir.TensorType(kind)
    write({"model": model}, tmp_path)
    loaded = ir.load(tmp_path / "model.onnx").graph.initializers["a"].const_value
    assert loaded is not None
    assert loaded.dtype == kind
    np.testing.assert_array_equal(loaded.numpy().astype(np.float32), array)


def test_a_large_constant_is_written_once(tmp_path: Path) -> None:
    """Constants that no checkpoint holds are told apart by their numbers."""
    graphs = {"first": model_of("a"), "second": model_of("a")}
    for graph in graphs.values():
        array = np.ones((64, 64), np.float32)
        graph.graph.initializers["a"].const_value = ir.tensor(array, name="a")
    write(graphs, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 64 * 64 * 4


def test_refuses_an_unbound_graph(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="no data for a"):
        write({"model": model_of("a")}, tmp_path)


def test_tied_embedding_is_written_once(lowered: Callable[[str], Any]) -> None:
    """T5's embedding serves both graphs and the head from one place."""
    directory = lowered("t5").directory
    encoder, decoder = (entries(directory / f"{name}.onnx") for name in ("encoder", "decoder"))
    assert encoder["shared.weight"] == decoder["shared.weight"]
    stored = {name: int(entry["length"]) for name, entry in (encoder | decoder).items()}
    for name, parameter in lowered("t5").reference.named_parameters():
        assert stored.get(name, parameter.nbytes) == parameter.nbytes
    size = (directory / "weights.bin").stat().st_size
    assert size < sum(stored.values()) + 4096 * len(stored)
    assert {name for name in stored if "embed" in name or "lm_head" in name} == set()


def test_a_check_that_reads_a_weight_says_why_it_cannot() -> None:
    """Small weights are read for shape inference."""

    def refuse() -> Array:
        raise CheckpointError("w overflows")

    model = model_of("w", shape=(2, 2))
    bind({"model": model}, {"w": ComputedTensor("w", "float32", (2, 2), refuse)})
    with pytest.raises(CheckpointError, match=r"^w overflows$"):
        check_graph(model)
