"""Blocks: what ONNX Runtime computes with them, how near they are, and what they are made of."""

from __future__ import annotations

import tracemalloc
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper

from eptc.errors import BaseModelError
from eptc.lower import blocks
from eptc.lower.blocks import PRECISIONS, Blocks, Method

Float = npt.NDArray[np.floating[Any]]
Bits = Literal[4, 8]
METHODS: tuple[Method, ...] = ("rtn", "k-quant")
# Rows, columns, bits, numbers in a block: one block, an odd number, one that is not full.
SHAPES: list[tuple[int, int, Bits, int]] = [
    (5, 32, 4, 32), (8, 96, 4, 32), (7, 41, 4, 16), (3, 130, 4, 128), (8, 64, 8, 32),
    (7, 41, 8, 32), (3, 16, 8, 16),
]  # fmt: skip


def matrix(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Numbers of which some rows are far from symmetric and one number is far out."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(rows, columns)) * rng.lognormal(size=(rows, 1))
    found[::3] += 2 * np.abs(found[::3]).max()
    found[rows // 2, columns // 2] *= 20
    return found


def decoded(parts: Any, how: Blocks, columns: int) -> npt.NDArray[np.float64]:
    """Decode as the kernels' documentation says."""
    codes, scales, zeros = parts
    rows, count = scales.shape
    codes, zeros = (each.reshape(rows, -1) for each in (codes, zeros))
    if how.bits == 4:
        codes, zeros = (
            np.stack([each & 15, each >> 4], -1).reshape(rows, -1) for each in (codes, zeros)
        )
    offsets = codes.reshape(rows, count, how.size) - zeros[:, :count, None].astype(np.float64)
    found: npt.NDArray[np.float64] = (offsets * scales[:, :, None]).reshape(rows, -1)[:, :columns]
    return found


def run(parts: Any, how: Blocks, columns: int, x: Float, level: int = 0) -> Float:
    """Return x times the transposed matrix as ONNX Runtime computes it."""
    names = ["codes", "scales", "zeros"]
    attributes: dict[str, Any] = {
        "K": columns,
        "N": len(parts[0]),
        "bits": how.bits,
        "block_size": how.size,
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", accuracy_level=level,
        **attributes,
    )  # fmt: skip
    ports = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xy"]
    initializers = [
        onnx.numpy_helper.from_array(array, name) for array, name in zip(parts, names, strict=True)
    ]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: Float = session.run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns", "bits", "size"), SHAPES)
def test_kernel_reads_them(rows: int, columns: int, bits: Bits, size: int, method: Method) -> None:
    """Shapes as declared; the kernel multiplies by the decoded matrix."""
    how = Blocks(bits, size, method)
    parts = how.quantize(matrix(rows, columns))
    assert tuple(part.shape for part in parts) == how.shapes(rows, columns)
    assert [part.dtype for part in parts] == [np.uint8, np.float32, np.uint8]
    assert sum(part.nbytes for part in parts) == how.nbytes(rows, columns)
    x = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    want = x @ decoded(parts, how, columns).T
    np.testing.assert_allclose(
        run(parts, how, columns, x), want, rtol=0, atol=1e-5 * abs(want).max()
    )


@pytest.mark.parametrize(("rows", "columns", "bits", "size"), SHAPES)
def test_nearest(rows: int, columns: int, bits: Bits, size: int) -> None:
    """Rounding to nearest is off by half a step at most, of the step that just covers a block."""
    how, exact = Blocks(bits, size), matrix(rows, columns)
    parts = how.quantize(exact)
    for row, found in zip(exact, decoded(parts, how, columns), strict=True):
        for start in range(0, columns, size):
            block = row[start : start + size]
            step = (max(block.max(), 0) - min(block.min(), 0)) / (2**bits - 1)
            assert np.abs(found[start : start + size] - block).max() <= 0.5000001 * step


@pytest.mark.parametrize("bits", [4, 8])
def test_k_quant_is_never_worse(bits: Bits) -> None:
    """By block; and it is better somewhere, or it would be rounding to nearest by another name."""
    exact = np.random.default_rng(0).normal(size=(64, 256))
    errors = []
    for method in METHODS:
        how = Blocks(bits, 32, method)
        off = decoded(how.quantize(exact), how, 256) - exact
        errors.append(np.square(off).reshape(64, 8, 32).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-12)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()


# Blocks that a method may stumble over: what it divides by is 0, or 0 is out of range.
ODD = {
    "zeros": np.zeros((2, 64)),
    "a constant": np.full((2, 64), 0.05),
    "all positive": np.linspace(0.9, 1.0, 128).reshape(2, 64),
    "all negative": -np.linspace(0.9, 1.0, 128).reshape(2, 64),
    "one number": np.eye(2, 64),
    "too small for a float32": np.full((2, 64), 1e-300),
    "hardly a float32": np.linspace(0, 3e-44, 128).reshape(2, 64),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("method", METHODS)
def test_odd_blocks(method: Method, what: str) -> None:
    how, exact = Blocks(4, 32, method), ODD[what]
    found = decoded(how.quantize(exact), how, 64)
    span = max(exact.max(), 0) - min(exact.min(), 0)
    assert np.abs(found - exact).max() <= 0.5000001 * span / 15 + 1e-44


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(wrong: float) -> None:
    exact = matrix(4, 64)
    exact[3, 40] = wrong
    with pytest.raises(BaseModelError, match=r"^head\.weight has numbers"):
        Blocks().quantize(exact, "head.weight")


@pytest.mark.parametrize("method", METHODS)
def test_pieces_change_nothing(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are quantised at once, and whichever way round the matrix lies."""
    exact, how = matrix(40, 100), Blocks(4, 32, method)
    want = how.quantize(exact)
    for numbers in (1, 700, 10**6):
        monkeypatch.setattr(blocks, "_NUMBERS", numbers)
        for given in (exact, np.asfortranarray(exact)):
            for got, array in zip(how.quantize(given), want, strict=True):
                np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_pieces(method: Method) -> None:
    """Beside the result, less than one copy of the matrix in float64, which has 34 MB."""
    exact, how = np.ones((2048, 2048), np.float32), Blocks(4, 32, method)
    exact[::7] = -2
    tracemalloc.start()
    try:
        parts = how.quantize(exact)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(part.nbytes for part in parts) <= peak <= 12e6


def test_rounded_once() -> None:
    """From float64: by way of bfloat16, as a base might be stored, codes would be others."""
    exact, how = matrix(64, 64), Blocks(8, 32)
    direct = how.quantize(exact)
    twice = how.quantize(exact.astype(ml_dtypes.bfloat16))
    assert not np.array_equal(direct[0], twice[0])
    off, more = (np.abs(decoded(p, how, 64) - exact).sum() for p in (direct, twice))
    assert off < 0.9 * more


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_folded_before_it_is_quantised(method: Method, bits: Bits) -> None:
    """The other way round, experts added to a base that was rounded, rounds twice."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(128, 256))
    experts = 0.1 * rng.normal(size=(128, 4)) @ rng.normal(size=(4, 256))
    how = Blocks(bits, 32, method)

    def stored(exact: Float) -> npt.NDArray[np.float64]:
        return decoded(how.quantize(exact), how, 256)

    after = np.square(stored(base + experts) - (base + experts)).mean()
    before = np.square(stored(stored(base) + experts) - (base + experts)).mean()
    assert before > 1.7 * after


def test_size_at_seven_billion() -> None:
    """Llama-2-7B's matrices in 4 bits: at most 0.18 of float32, embedding and head included."""
    width, wide, vocabulary = 4096, 11008, 32000
    layer = [(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]
    shapes = layer * 32 + [(vocabulary, width)] * 2
    norms = 65 * width
    numbers = sum(rows * columns for rows, columns in shapes) + norms
    assert 6.7e9 < numbers < 6.8e9
    for how, limit in ((PRECISIONS["int4"], 0.18), (PRECISIONS["int8-weights"], 0.27)):
        taken = sum(how.nbytes(*shape) for shape in shapes) + 4 * norms
        assert taken / (4 * numbers) <= limit
