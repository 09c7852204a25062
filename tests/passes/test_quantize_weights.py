"""QuantizeWeights: what it stores, what it leaves alone, and that kernels compute with it."""

from __future__ import annotations

import collections
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eptc import lower
from eptc.errors import OptionError
from eptc.lower.blocks import Blocks
from eptc.lower.weights import WeightTensor, bound
from eptc.passes.quantize_weights import QuantizeWeights
from eptc.passes.stable_names import StableNames
from eptc.pipeline import graph_passes
from eptc.precision import OptimizeFor
from eptc.run_passes import run_graph_passes
from eptc.tensors import ArrayTensor

Arrays = dict[str, npt.NDArray[Any]]

HEAD = "l: t = Transpose <perm = [1, 0]> (E) l: z = MatMul(x, t)"
TABLE = "e: z = Gather <axis = 0> (E, i)"
MATRIX = "l: z = MatMul(x, W)"
# Statements; what of them is left alone, and why.
LEAVES: dict[str, tuple[str, dict[str, Any], str]] = {
    "another operator": ("l: z = Gemm(x, W)", {}, "Gemm reads it"),
    "on the left": ("l: z = MatMul(W, W)", {}, "MatMul reads it"),
    "a vector": ("l: v = Squeeze(x, zero) l: z = MatMul(v, W)", {}, "MatMul reads it"),
    "columns looked up": ("e: z = Gather <axis = 1> (E, i)", {}, "Gather reads it"),
    "its transpose for another": (
        "l: t = Transpose <perm = [1, 0]> (E) l: z = Gather <axis = 0> (t, i)",
        {},
        "its transpose is not only multiplied by",
    ),
    "two layouts": (
        "e: y = Gather <axis = 0> (W, i) l: z = MatMul(x, W)", {}, "in two layouts",
    ),
    "short rows": (MATRIX, {"block_size": 128}, "its rows of 64 are shorter than a block"),
    "an odd number of blocks": (TABLE, {"block_size": 64}, "an odd number of blocks"),
    "kept": (MATRIX, {"keep": ("W",)}, "it is to be kept"),
    "not asked for": (MATRIX, {"only": ("E",)}, "others are to be quantised"),
}  # fmt: skip


def model(lines: str, columns: int = 64) -> ir.Model:
    """Build a graph on x [1, 64], i [2, 3] of statements `module: statement`, weights lazy.

    W is [64, 48], E is [50, columns].
    """
    statements = lines.replace("l: ", "").replace("e: ", "")
    result = "float[a,b,c] r" if "z = Gather" in lines else "float[a,b] r"
    m = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[1,64] x, int64[2,3] i) => '
        f"({result}) <int64[1] zero = {{0}}> {{ {statements} r = Abs(z) }}"
    )
    for node, name in zip(m.graph, "abcdef", strict=False):
        node.name = f"{name}/{node.op_type}"
        if node.op_type == "Squeeze":
            node.outputs[0].shape = ir.Shape([64])
    rng = np.random.default_rng(0)
    for name, shape in (("W", (64, 48)), ("E", (50, columns))):
        array = rng.normal(size=shape).astype(np.float32)
        readers = [(n, k) for n in m.graph for k, v in enumerate(n.inputs) if v and v.name == name]
        if readers:
            value = ir.Value(name=name, const_value=bound(ArrayTensor(name, array), name))
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
            m.graph.register_initializer(value)
            for node, index in readers:
                node.replace_input_with(index, value)
    return m


def weights(m: ir.Model) -> dict[str, tuple[str, list[int]]]:
    return {
        name: (str(value.dtype), list(value.const_value.shape.numpy()))
        for name, value in m.graph.initializers.items()
        if isinstance(value.const_value, WeightTensor)
    }


def run(m: ir.Model) -> npt.NDArray[Any]:
    rng = np.random.default_rng(1)
    feeds = {
        "x": rng.normal(size=(1, 64)).astype(np.float32),
        "i": np.array([[0, 49, -1], [7, 7, 8]]),
    }
    session = onnxruntime.InferenceSession(
        ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = {spec.name for spec in session.get_inputs()}
    found: npt.NDArray[Any] = session.run(None, {k: v for k, v in feeds.items() if k in wanted})[0]
    return found


# Statements, options, the kernels they become, shapes of integers and scales.
REWRITES: dict[str, tuple[str, dict[str, Any], list[str], str, list[int], list[int]]] = {
    "matrix": (MATRIX, {}, ["MatMulNBits"], "W", [48, 2, 16], [48, 2]),
    "matrix in 8 bits": (MATRIX, {"bits": 8}, ["MatMulNBits"], "W", [48, 2, 32], [48, 2]),
    "by k-quant": (MATRIX, {"method": "k-quant"}, ["MatMulNBits"], "W", [48, 2, 16], [48, 2]),
    "head": (HEAD, {}, ["MatMulNBits"], "E", [50, 2, 16], [50, 2]),
    "table": (TABLE, {}, ["GatherBlockQuantized"], "E", [50, 32], [50, 2]),
    "table in 8 bits": (
        TABLE, {"bits": 8, "block_size": 64}, ["GatherBlockQuantized"], "E", [50, 64], [50, 1],
    ),
    "table and head": (
        f"{TABLE.replace('z', 'y')} {HEAD}", {},
        ["GatherBlockQuantized", "Reshape", "MatMulNBits"], "E", [50, 32], [50, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REWRITES)
def test_rewrites(what: str) -> None:
    """The kernel computes with the decoded matrix: as near as its blocks are to the weight."""
    lines, options, operators, name, shape, scales = REWRITES[what]
    m, exact = model(lines), model(lines)
    step = QuantizeWeights(accuracy_level=0, **options)
    assert step(m).modified
    assert [node.op_type for node in m.graph][:-1] == operators
    assert weights(m) == {
        name: ("UINT8", shape),
        f"{name}@scale": ("FLOAT", scales),
        f"{name}@zero_point": ("UINT8", [shape[0], 1 if step.bits == 4 else scales[1]]),
    }
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    got, want = run(m), run(exact)
    assert got.shape == want.shape
    off = np.abs(got - want).max()
    assert 0 < off < (0.03 if step.bits == 8 else 0.5) * np.abs(want).max()
    assert not step(m).modified


def test_accuracy_level() -> None:
    """Rounding activations moves the result too; the attribute says whether they are."""
    results = []
    for level in (0, 4):
        m = model(MATRIX)
        QuantizeWeights(accuracy_level=level)(m)
        node = next(node for node in m.graph if node.op_type == "MatMulNBits")
        assert node.attributes.get_int("accuracy_level", 0) == level
        results.append(run(m))
    moved = np.abs(results[0] - results[1]).max()
    assert 0 < moved < 0.02 * np.abs(results[0]).max()


def test_table_with_a_block_that_is_not_full() -> None:
    """What fills it up is looked up, and cut off."""
    m, exact = model(TABLE, 100), model(TABLE, 100)
    assert QuantizeWeights(bits=8)(m).modified
    assert [node.op_type for node in m.graph] == ["GatherBlockQuantized", "Slice", "Abs"]
    assert weights(m)["E"] == ("UINT8", [50, 128])
    np.testing.assert_allclose(run(m), run(exact), rtol=0, atol=0.02)


@pytest.mark.parametrize("what", LEAVES)
def test_leaves_alone(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where a condition does not hold, the model stays the same to the byte; the log says why."""
    lines, options, reason = LEAVES[what]
    m = model(lines)
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    with caplog.at_level(logging.DEBUG, "eptc.passes.quantize_weights"):
        assert not QuantizeWeights(**options)(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    said = [r.message for r in caplog.records if r.name == "eptc.passes.quantize_weights"]
    assert said
    assert all(reason in message for message in said)


def test_leaves_what_callers_see() -> None:
    m = model(MATRIX)
    m.graph.outputs.append(m.graph.initializers["W"])
    assert not QuantizeWeights()(m).modified


def test_leaves_what_is_not_bound() -> None:
    m = model(MATRIX)
    m.graph.initializers["W"].const_value = ir.tensor(np.zeros((64, 48), np.float32))
    assert not QuantizeWeights()(m).modified


def test_names_of_packed_weights() -> None:
    """A packed weight is kept, or asked for, by any of its parts."""
    for options, modified in (
        ({"keep": ("a.weight",)}, False),
        ({"only": ("b.weight",)}, True),
        ({"only": ("c.weight",)}, False),
    ):
        m = model(MATRIX)
        m.graph.initializers["W"].name = "a.weight+b.weight"
        assert QuantizeWeights(**options)(m).modified is modified  # type: ignore[arg-type]


def test_stays_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(MATRIX)
    monkeypatch.setattr(WeightTensor, "numpy", lambda self: pytest.fail(f"read {self}"))
    assert QuantizeWeights()(m).modified


def test_options_are_json() -> None:
    step = QuantizeWeights(keep=("a",), only=("b", "c"))
    options = json.loads(json.dumps(step.options()))
    assert QuantizeWeights(**options) == step


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"block_size": 48},
        {"block_size": 8},
        {"method": "best"},
        {"accuracy_level": 5},
    ],
    ids=str,
)
def test_options_that_no_kernel_takes(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"quantize-weights: {next(iter(options))} is "):
        QuantizeWeights(**options)


def test_from_what_was_folded() -> None:
    """The integers come from the float64 origin: by way of float32 some would be others."""
    exact = np.random.default_rng(3).normal(size=(400, 64))
    how = Blocks(8, 32)
    codes, *_ = how.quantize(exact)
    assert not np.array_equal(codes, how.quantize(exact.astype(np.float16))[0])
    m = model(HEAD)
    m.graph.initializers["E"].const_value = bound(ArrayTensor("E", exact), "E")
    QuantizeWeights(bits=8)(m)
    stored = m.graph.initializers["E"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), codes)


# Whole models.


# Kernels by graph; matrices of pooler, classifier and position bias stay as they are.
KERNELS: dict[tuple[str, OptimizeFor], dict[str, tuple[int, int]]] = {
    ("bert", "cpu"): {"model": (12, 3)},
    ("bert", "cuda"): {"model": (9, 3)},
    ("t5", "cpu"): {"encoder": (16, 1), "decoder": (17, 1)},
    ("gated-t5", "any"): {"encoder": (18, 1), "decoder": (19, 1)},
    ("llama", "cpu"): {"model": (15, 1)},
    ("tied-llama", "cuda"): {"model": (9, 1)},
}


def dequantised(exact: dict[str, ir.Model], how: Blocks, names: set[str]) -> None:
    """Give float weights the numbers that their blocks stand for."""
    for m in exact.values():
        for name, value in m.graph.initializers.items():
            if name not in names:
                continue
            tensor = value.const_value
            assert tensor is not None
            across = any(node.op_type == "MatMul" for node in value.consumers())
            array = tensor.numpy().T if across else tensor.numpy()
            codes, scales, zeros = how.quantize(array)
            assert how.bits == 8
            offsets = codes.astype(np.float32) - zeros.astype(np.float32)[:, :, None]
            decoded = (offsets * scales.astype(np.float32)[:, :, None]).reshape(len(codes), -1)[
                :, : array.shape[1]
            ]
            value.const_value = ir.tensor(np.ascontiguousarray(decoded.T if across else decoded))


@pytest.mark.parametrize(("name", "provider"), KERNELS)
def test_whole_models(
    name: str, provider: OptimizeFor, whole_model: Any, first_step: Any, tmp_path: Path
) -> None:
    """After the exact passes: every matrix is stored so, and the graph computes with that."""
    exact, lossy = whole_model(name), whole_model(name)
    run_graph_passes(exact, graph_passes(provider))
    run_graph_passes(lossy, graph_passes(provider))
    step = QuantizeWeights(bits=8, accuracy_level=0)
    (record,) = run_graph_passes(lossy, [step])
    assert record.after["weight_bytes"] < 0.45 * record.before["weight_bytes"]
    run_graph_passes(lossy, [StableNames()])
    for key, (products, lookups) in KERNELS[name, provider].items():
        counted = collections.Counter(node.op_type for node in lossy[key].graph)
        assert (counted["MatMulNBits"], counted["GatherBlockQuantized"]) == (products, lookups)
    names = {n for m in lossy.values() for n, (kind, _) in weights(m).items() if kind == "UINT8"}
    dequantised(exact, Blocks(8, 32), names)
    want = first_step(exact, tmp_path / "exact")
    got = first_step(lossy, tmp_path / "lossy")
    for key, array in want.items():
        atol = 2e-5 * float(np.abs(array).max(initial=0))
        np.testing.assert_allclose(got[key], array, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", ["t5", "tied-llama"])
def test_tied_embedding_is_stored_once(
    name: str, whole_model: Any, sessions: Any, tmp_path: Path
) -> None:
    lossy = whole_model(name)
    run_graph_passes(lossy, graph_passes("cpu"))
    table = "shared.weight" if name == "t5" else "model.embed_tokens.weight"
    run_graph_passes(lossy, [QuantizeWeights(only=(table,))])
    for key in (table, f"{table}@scale", f"{table}@zero_point"):
        tensors = [m.graph.initializers[key].const_value for m in lossy.values()]
        assert len({t.key for t in tensors if isinstance(t, WeightTensor)}) == 1
    sessions(lossy, tmp_path / "lossy")
    places = set()
    for key in lossy:
        tensor = ir.load(tmp_path / "lossy" / f"{key}.onnx").graph.initializers[table].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        places.add((tensor.offset, tensor.length))
    assert len(places) == 1
    assert places.pop()[1] == 80 * 64 // 2


@pytest.mark.parametrize("method", ["rtn", "k-quant"])
def test_same_bytes_twice(method: str, whole_model: Any, tmp_path: Path) -> None:
    digests = []
    for folder, threads in (("a", 1), ("b", 2)):
        lossy = whole_model("t5")
        step = QuantizeWeights(method=method)  # type: ignore[arg-type]
        run_graph_passes(lossy, [*graph_passes("cpu")[:-1], step, StableNames()])
        (tmp_path / folder).mkdir()
        digests.append(lower.write(lossy, tmp_path / folder, threads=threads))
    assert digests[0] == digests[1]
