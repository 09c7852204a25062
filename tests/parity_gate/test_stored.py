"""Engines whose weights are integers: sound ones pass, each fault in a written file is named."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from eptc import job, lower
from eptc.bundle import write_manifest
from eptc.errors import ParityError
from eptc.lower.blocks import Blocks
from eptc.parity_gate import ParityReport, refuse
from eptc.parity_gate.nearest import check_nearest
from eptc.parity_gate.partition import Partition
from eptc.parity_gate.reference import load_reference
from eptc.parity_gate.stored import Decoder, quantized
from eptc.parity_gate.weights import check_weights
from eptc.passes.quantize_weights import QuantizeWeights
from eptc.pipeline import graph_passes
from eptc.runtime.manifest import read_manifest
from eptc.tensors import ArrayTensor

Array = npt.NDArray[Any]
Change = Callable[[ir.Graph], None]

Q = "model.layers.1.self_attn.q_proj.weight"  # [64, 64], adapted
UP = "model.layers.0.mlp.up_proj.weight"
TABLE = "model.embed_tokens.weight"
K_AND_V = "+".join(f"bert.encoder.layer.0.attention.self.{x}.weight" for x in ("key", "value"))


@pytest.fixture(scope="module")
def subject(recorded: Any, paper: Any) -> Callable[[str], Any]:
    return lambda name: paper() if name == "bert" else recorded(name)


@pytest.fixture(scope="module")
def written(subject: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the bundle of a subject's first task with blocks of 16."""
    made: dict[str, Path] = {}

    def write(name: str, provider: Any = "cpu", **options: Any) -> Path:
        key = f"{name} {provider} {sorted(options.items())}"
        if key not in made:
            *exact, names = graph_passes(provider)
            steps = [*exact, QuantizeWeights(block_size=16, **options), names]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job, "graph_passes", lambda *_: steps)
                out = tmp_path_factory.mktemp("stored") / "out"
                bundle = subject(name).export(out, 0, verify=False, optimize_for=provider)
            precision = "int8-weights" if options.get("bits") == 8 else "int4"
            manifest = dataclasses.replace(bundle.manifest, precision=precision)
            write_manifest(bundle.path, manifest)
            made[key] = bundle.path
        return made[key]

    return write


@pytest.fixture
def prove(subject: Any, prove_by_block: Any) -> Callable[..., ParityReport]:
    """Return a function that verifies a folder against a subject, block by block."""
    return lambda name, directory: prove_by_block(subject(name), directory)


@pytest.fixture
def check(subject: Any) -> Callable[..., float]:
    """Return a function that compares the weights of a folder with a subject's."""

    def run(name: str, directory: Path) -> float:
        found = subject(name)
        reference = load_reference(found.read())
        files = [path.name for path in sorted(directory.glob("*.onnx"))]
        return check_weights(directory, files, reference, 0)

    return run


@pytest.fixture
def planted(written: Any, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a subject's graph with a change in its weights."""

    def plant(change: Change, name: str = "llama-tiny", **options: Any) -> Path:
        model = ir.load(written(name, **options) / "model.onnx")
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
        change(model.graph)
        lower.write({"model": model}, tmp_path)
        return tmp_path

    return plant


def edited(name: str, step: Callable[[Array], Array]) -> Change:
    """Other numbers in an initializer."""

    def change(graph: ir.Graph) -> None:
        value = graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(np.ascontiguousarray(step(value.const_value.numpy())))
        value.shape = ir.Shape(value.const_value.shape.numpy())

    return change


ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-tiny", {}),
    "llama in 8 bits": ("llama-tiny", {"bits": 8}),
    "llama by k-quant": ("llama-tiny", {"method": "k-quant"}),
    "t5, tied": ("t5-tiny", {}),
    "gated t5 in 8 bits": ("t5-gated-tiny", {"bits": 8, "accuracy_level": 0}),
    "bert": ("bert", {}),
    "bert, packed": ("bert", {"provider": "cuda"}),
}


@pytest.mark.parametrize("what", ENGINES)
def test_sound(written: Any, prove: Any, check: Any, what: str) -> None:
    """With the bound of float32: nothing of the rounding is left in the comparison."""
    name, options = ENGINES[what]
    directory = written(name, **options)
    report = prove(name, directory)
    refuse(report, "nothing is wrong with it")
    assert report.bound.relative == 3e-5
    assert (report.published is not None) is (options.get("accuracy_level", 4) == 4)
    assert "weights as they are stored" in report.summary()["reference"]
    assert 0.9 < check(name, directory) <= 1.0


def _swapped(array: Array) -> Array:
    swapped: Array = array >> 4 | array << 4
    return swapped


def _one_code(array: Array) -> Array:
    array[-1, 0, -1] ^= 0x30
    return array


def _by_column(array: Array) -> Array:
    """The matrix the other way round, in blocks: [64, 4, 8] of 64 x 64."""
    codes = np.stack([array & 15, array >> 4], -1).reshape(64, 64).T
    packed: Array = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(array.shape)
    return packed


def _another_reader(graph: ir.Graph) -> None:
    """Blocks of a reader that says they have 32 numbers, with as many scales."""
    node = next(n for n in graph if n.op_type == "MatMulNBits" and _reads(n, Q))
    node.attributes["block_size"] = ir.AttrInt64("block_size", 32)


def _scales_exchanged(graph: ir.Graph) -> None:
    a, b = (graph.initializers[f"{name}@scale"] for name in (Q, Q.replace("q_proj", "o_proj")))
    a.const_value, b.const_value = b.const_value, a.const_value


def _reads(node: ir.Node, name: str) -> bool:
    return any(value is not None and value.name == name for value in node.inputs)


def _one_scale(scales: Array) -> Array:
    scales[3, 2] *= np.float32(1.3)
    return scales


def _zero_off(by: int) -> Callable[[Array], Array]:
    return lambda zeros: np.where(zeros & 15 < 15, zeros + by, zeros - by).astype(np.uint8)


FAULTS: dict[str, tuple[str, Change]] = {
    "nibbles exchanged": (Q, edited(Q, _swapped)),
    "one code": (UP, edited(UP, _one_code)),
    "zero points off by one": (Q, edited(f"{Q}@zero_point", _zero_off(1))),
    "zero points of the neighbours": (
        UP, edited(f"{UP}@zero_point", lambda zeros: np.roll(zeros, 1, 0)),
    ),
    "zero points exchanged": (Q, edited(f"{Q}@zero_point", _swapped)),
    "scales of the neighbours": (Q, edited(f"{Q}@scale", lambda scales: np.roll(scales, 1, 0))),
    "scales of the next blocks": (UP, edited(f"{UP}@scale", lambda scales: np.roll(scales, 1, 1))),
    "one scale": (Q, edited(f"{Q}@scale", _one_scale)),
    "scales of another weight": (Q, _scales_exchanged),
    "the other way round": (Q, edited(Q, _by_column)),
    "rows of a table": (TABLE, edited(TABLE, lambda table: np.roll(table, 1, 0))),
    "scales of a table": (TABLE, edited(f"{TABLE}@scale", lambda s: np.roll(s, 1, 0))),
    "blocks of another size": (Q, _another_reader),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_fault(planted: Any, check: Any, what: str) -> None:
    name, change = FAULTS[what]
    directory = planted(change)
    with pytest.raises(ParityError, match=f"^the weight {name}") as raised:
        check("llama-tiny", directory)
    assert "in the engine" in raised.value.found


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_range(factor: float) -> None:
    """Codes that are the nearest there are, in a range that is too narrow, right, or too wide."""
    exact = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    groups = exact.reshape(6, 4, 16)
    scales = (groups.max(-1) - groups.min(-1)) / 15.0 * factor
    zeros = np.rint(-groups.min(-1) / scales)
    codes = np.clip(np.rint(groups / scales[..., None] + zeros[..., None]), 0, 15)
    codes = codes.astype(np.uint8).reshape(6, 64)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    decoder = Decoder(packed, scales, zeros, 4, 16, 64, False, 15, True)
    if factor == 1.0:
        assert 0.9 < check_nearest("w", decoder, exact, None) <= 1.0
        return
    with pytest.raises(ParityError, match=r"^the weight w in the engine is too coarse at"):
        check_nearest("w", decoder, exact, None)


def quantised(weight: Array, how: str) -> tuple[Array, Array]:
    """Return 8-bit integers [in, out] with a scale [out], as if an int8 pass had made them."""
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-9) / np.float32(127)
    codes = np.rint(weight / scale).astype(np.int8)
    return (codes.T if how == "columns" else codes), scale[:, 0].astype(np.float32)


@pytest.fixture
def plain(subject: Any, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a llama with one matrix and its table in plain 8 bits."""

    def write(change: Callable[[dict[str, Array]], None] = lambda _: None) -> Path:
        source = subject("llama-tiny").read()
        bundle = subject("llama-tiny").export(tmp_path / "float", 0, verify=False)
        model = ir.load(bundle.path / "model.onnx")
        arrays: dict[str, Array] = {}
        for name, how in ((Q, "columns"), (TABLE, "rows")):
            stored = model.graph.initializers[name].const_value
            assert stored is not None
            array = stored.numpy()
            arrays[name], arrays[f"{name}@scale"] = quantised(
                array.T if how == "columns" else array, how
            )
        arrays["base"] = source.model.weights[Q].numpy()
        change(arrays)
        del arrays["base"]
        for name, array in arrays.items():
            value = model.graph.initializers.get(name) or ir.Value(name=name)
            value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.shape = ir.Shape(array.shape)
            if name not in model.graph.initializers:
                model.graph.register_initializer(value)
        (tmp_path / "plain").mkdir()
        lower.write({"model": model}, tmp_path / "plain")
        return tmp_path / "plain"

    return write


def test_plain_integers(plain: Any, check: Any) -> None:
    assert 0.9 < check("llama-tiny", plain()) <= 1.0


def _before_folding(arrays: dict[str, Array]) -> None:
    arrays[Q], arrays[f"{Q}@scale"] = quantised(arrays["base"], "columns")


def _rolled(name: str) -> Callable[[dict[str, Array]], None]:
    def change(arrays: dict[str, Array]) -> None:
        arrays[name] = np.roll(arrays[name], 1, 0)

    return change


def _transposed(arrays: dict[str, Array]) -> None:
    arrays[Q] = arrays[Q].T


PLAIN: dict[str, tuple[str, Callable[[dict[str, Array]], None]]] = {
    "quantised before folding": (Q, _before_folding),
    "scales of the neighbours": (Q, _rolled(f"{Q}@scale")),
    "the other way round": (Q, _transposed),
    "rows of a table": (TABLE, _rolled(TABLE)),
    "scales of a table": (TABLE, _rolled(f"{TABLE}@scale")),
}


@pytest.mark.parametrize("what", PLAIN)
def test_fault_in_plain_integers(plain: Any, check: Any, what: str) -> None:
    name, change = PLAIN[what]
    with pytest.raises(ParityError, match=f"^the weight {name} in the engine is off at"):
        check("llama-tiny", plain(change))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "k-quant"])
def test_base_quantised_before_folding(
    subject: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    method: Any, bits: Any,
) -> None:  # fmt: skip
    """The base rounded to blocks, the experts added to that, and the sum rounded again."""
    how = QuantizeWeights(bits, 16, method)._blocks
    sound = lower.bind

    def bind(graphs: Mapping[str, ir.Model], weights: Mapping[str, Any]) -> None:
        source = subject("llama-tiny").read()
        base, folded = (
            each.numpy().astype(np.float64) for each in (source.model.weights[Q], weights[Q])
        )
        parts: list[Array] = list(how.quantize(base))
        codes, zeros = parts[0].reshape(64, -1), parts[2]
        if bits == 4:
            codes, zeros = (
                np.stack([each & 15, each >> 4], -1).reshape(64, -1) for each in (codes, zeros)
            )
        offsets = codes.reshape(64, 4, 16) - zeros.reshape(64, 4, 1).astype(np.float64)
        twice = (offsets * parts[1][:, :, None]).reshape(64, 64) + (folded - base)
        sound(graphs, {**weights, Q: ArrayTensor(Q, twice.astype(np.float32))})

    monkeypatch.setattr(lower, "bind", bind)
    *exact, names = graph_passes("cpu")
    steps = [*exact, QuantizeWeights(bits, 16, method), names]
    monkeypatch.setattr(job, "graph_passes", lambda *_: steps)
    path = subject("llama-tiny").export(tmp_path / "out", 0, verify=False).path
    with pytest.raises(ParityError, match=f"^the weight {Q} in the engine is off at"):
        check("llama-tiny", path)


def test_shape_that_its_reader_does_not_have(planted: Any, check: Any) -> None:
    directory = planted(edited(f"{Q}@scale", lambda scales: scales[:, :3]))
    with pytest.raises(ParityError, match=f"^the weight {Q}@scale in the engine has the shape"):
        check("llama-tiny", directory)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_rounded_to_16_bits(subject: Any, check: Any, tmp_path: Path, dtype: Any) -> None:
    """Of a float32 base: rounded once to the bit where nothing was folded in."""
    path = subject("llama-tiny").export(tmp_path / "float", 0, verify=False).path
    model = ir.load(path / "model.onnx")

    def store(step: Callable[[Array], Array]) -> Path:
        for name in (Q, TABLE):
            value = model.graph.initializers[name]
            assert value.const_value is not None
            array = step(value.const_value.numpy().astype(dtype))
            value.const_value = ir.tensor(array, name=name)
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        lower.write({"model": model}, tmp_path)
        return tmp_path

    check("llama-tiny", store(np.copy))

    def one_bit(array: Array) -> Array:
        array.reshape(-1).view(np.uint16)[7] ^= 1
        return array

    with pytest.raises(ParityError, match=f"the weight {TABLE} in the engine is not the base's"):
        check("llama-tiny", store(one_bit))


def test_fault_in_the_graph(written: Any, prove: Any, tmp_path: Path) -> None:
    """A residual left out is found in its block, as in an engine of float32."""
    directory = tmp_path / "copy"
    shutil.copytree(written("llama-tiny"), directory)
    model = ir.load(directory / "model.onnx")
    add = next(n for n in model.graph if n.name == "model.layers.1/Add")
    result, other = add.outputs[0], add.inputs[1]
    assert other is not None
    for node, index in tuple(result.uses()):
        node.replace_input_with(index, other)
    ir.save(model, directory / "model.onnx")
    manifest = dataclasses.replace(read_manifest(directory), files={})
    write_manifest(directory, manifest)
    report = prove("llama-tiny", directory)
    assert next(c for c in report.tensors if not c.passed).what.startswith("model.layers.1")


def test_blocks_with_and_without_rounding(written: Any) -> None:
    """They are compared without rounded activations, and as the graph that runs rounds them."""
    directory = written("llama-tiny")
    partition = Partition(directory / "model.onnx", [["model.layers.0", "model.layers.1"]])
    part = partition.parts["model.layers.0"]
    assert part.rounds
    arrays = dict.fromkeys(part.inputs, np.zeros((1, 1, 64), np.float32))
    # In this order: the graph itself stays as it is.
    for published in (False, True):
        content = partition.serialize(part, arrays, published=published)
        graph = ir.from_proto(onnx.load_from_string(content)).graph
        nodes = [node for node in graph if node.op_type == "MatMulNBits"]
        assert nodes
        assert all(("accuracy_level" in node.attributes) is published for node in nodes)


def test_memory_of_a_comparison() -> None:
    """Some rows at a time: decoded as a whole, the weight would have 34 MB in float64."""
    exact = np.ones((2048, 2048), np.float32)
    exact[::7] = -2
    codes, scales, _ = Blocks(8, 32).quantize(exact)
    middle = np.where(exact[:, ::32] < 0, 255.0, 0.0)
    decoder = Decoder(
        codes.reshape(2048, 2048), scales.astype(np.float64), middle, 8, 32, 2048, False, 255, True
    )
    tracemalloc.start()
    try:
        assert check_nearest("w", decoder, exact, None) <= 1.0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 12e6


def test_how_each_weight_is_read(written: Any) -> None:
    graph = ir.load(written("t5-tiny") / "decoder.onnx").graph
    names = [weight.name for weight in quantized(graph)]
    assert len(set(names)) == len(names) > 8
    assert "shared.weight" in names
    decoder = next(w for w in quantized(graph) if w.name == "shared.weight").open()
    assert (decoder.bits, decoder.group, decoder.fitted) == (4, 16, True)
    some = decoder.part(2, 3).rows(slice(1, 3), 5)
    np.testing.assert_array_equal(some.numbers, decoder.rows(slice(3, 5), 64).numbers[:, :5])
