"""The int8 numbers: half a step at most, rounded once, zeros and odd layouts included."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from eptc.errors import BaseModelError, OptionError
from eptc.lower.int8 import FULL, REDUCED, activation, integers, quantize
from eptc.lower.weights import WeightTensor, bound
from eptc.tensors import Array, ArrayTensor

FLOAT32 = np.finfo(np.float32)


def matrices(dtype: Any, limit: float) -> st.SearchStrategy[Array]:
    shapes = npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7)
    width: Any = np.dtype(dtype).itemsize * 8
    return npst.arrays(dtype, shapes, elements=st.floats(-limit, limit, width=width))


@pytest.mark.parametrize("largest", [FULL, REDUCED])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ["C", "F"])
@given(matrix=st.one_of(matrices(np.float32, float(FLOAT32.max)), matrices(np.float64, 1e38)))
@example(matrix=np.zeros((2, 3), np.float32))
@example(matrix=np.full((2, 2), FLOAT32.max, np.float32))
@example(matrix=np.full((2, 2), FLOAT32.tiny, np.float32))
@example(matrix=np.full((1, 1), FLOAT32.smallest_subnormal, np.float32))
def test_half_a_step(matrix: Array, order: Any, axis: int, largest: int) -> None:
    """Every number moves by half a step at most, whatever its size; the largest stays."""
    whole, scale = quantize(np.asarray(matrix, order=order), axis, largest=largest)
    assert (whole.dtype.name, whole.shape) == ("int8", matrix.shape)
    assert (scale.dtype.name, scale.shape) == ("float32", (matrix.shape[axis],))
    assert scale.min() > 0
    assert np.abs(whole.astype(int)).max() <= largest
    step = np.expand_dims(scale.astype(np.float64), 1 - axis)
    exact = matrix.astype(np.longdouble)
    assert (np.abs(whole * step - exact) <= step / 2 * (1 + 2**-50)).all()
    magnitudes = np.abs(exact).max(axis=1 - axis)
    stepped = magnitudes / largest >= FLOAT32.tiny * 1.001
    assert (np.abs(whole.astype(int)).max(axis=1 - axis) == largest)[stepped].all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_rounding_half_to_even(order: Any, axis: int, dtype: Any) -> None:
    """As the formula says, on more numbers than are converted at once."""
    shape = (300, 500)
    matrix = np.asarray(np.random.default_rng(0).normal(size=shape).astype(dtype), order=order)
    whole, scale = quantize(matrix, axis)
    exact = matrix.astype(np.float64)
    want = (np.abs(exact).max(axis=1 - axis) / FULL).astype(np.float32)
    np.testing.assert_array_equal(scale, want)
    step = np.expand_dims(want, 1 - axis).astype(np.float64)
    np.testing.assert_array_equal(whole, np.rint(exact / step))
    assert whole.flags.f_contiguous is matrix.flags.f_contiguous
    # Halves go to the even neighbour.
    halves = np.array([[FULL, 0.5, 1.5, 2.5, -0.5, -1.5]], dtype)
    assert quantize(halves, 0)[0].tolist() == [[FULL, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e60])
@pytest.mark.parametrize("axis", [0, 1])
def test_refuses_what_is_not_finite(axis: int, bad: float) -> None:
    matrix = np.ones((3, 4))
    matrix[1, 2] = bad
    with pytest.raises(BaseModelError, match=r"wi\.weight has numbers that are not finite"):
        quantize(matrix, axis, name="wi.weight")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_is_bounded(order: Any, axis: int) -> None:
    """Beside the integers, a block of numbers, not a copy of the matrix."""
    matrix = np.ones((2048, 2048), np.float32, order=order)
    tracemalloc.start()
    quantize(matrix, axis)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < matrix.size + 6 * 2**20


def test_reads_the_numbers_before_they_were_float32() -> None:
    """A float64 that float32 would move over a half is rounded as it is."""
    column = np.array([127.0, 0.5 + 2.0**-40, 1.5 - 2.0**-40])
    tensor = bound(ArrayTensor("w", np.stack([column, column], 1)), "w")
    assert quantize(tensor.numpy(), 1)[0][:, 0].tolist() == [127, 0, 2]
    whole, scale = integers(tensor, 1)
    assert whole.numpy()[:, 0].tolist() == [127, 1, 1]
    assert (whole.name, whole.dtype) == ("w", ir.DataType.INT8)
    assert (scale.name, scale.dtype) == ("w@scale", ir.DataType.FLOAT)
    assert scale.numpy().tolist() == [1, 1]


def test_equal_weights_are_one_tensor() -> None:
    """Whoever reads a weight the same way shares what is written; another way does not."""
    source = ArrayTensor("w", np.ones((4, 4), np.float32))
    first, second, other = (integers(bound(source, "w"), axis) for axis in (0, 0, 1))
    assert [t.key for t in first] == [t.key for t in second]
    assert {t.key for t in first}.isdisjoint(t.key for t in other)
    reduced = integers(bound(source, "w"), 0, largest=REDUCED)
    assert {t.key for t in first}.isdisjoint(t.key for t in reduced)
    assert all(isinstance(t, WeightTensor) for t in first)


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.tuples(FLOATS, FLOATS).map(sorted), st.booleans(), st.floats(0, 1))
@example((0.0, 0.0), True, 0.0)
@example((1.0, 1.0), False, 1.0)
@example((-3.0, -1.0), False, 0.0)
@example((0.0, float(FLOAT32.smallest_subnormal)), False, 1.0)
def test_activation_covers_its_range(ends: list[float], symmetric: bool, at: float) -> None:
    """Zero is exact; a value of the range moves by a step at most, half of it within."""
    low, high = ends
    scale, zero = activation(low, high, symmetric=symmetric, name="x")
    assert (scale.dtype.name, scale.shape, zero.shape) == ("float32", (), ())
    assert zero.dtype == (np.int8 if symmetric else np.uint8)
    assert scale > 0
    if symmetric:
        assert zero == 0
    kind = np.iinfo(zero.dtype)
    least = -FULL if symmetric else kind.min
    low, high = min(low, 0.0), max(high, 0.0)
    x = low + (high - low) * at
    step = float(scale)
    q = np.clip(np.rint(x / step) + int(zero), least, kind.max)
    assert abs((q - int(zero)) * step - x) <= step * (0.5 if symmetric else 1) * (1 + 2**-20)


@pytest.mark.parametrize(
    ("low", "high", "step", "point"),
    [(-1.0, 1.55, 0.01, 100), (0.0, 2.55, 0.01, 0), (-2.55, 0.0, 0.01, 255),
     (-3.0, -1.0, 3 / 255, 255), (0.0, 0.0, 1.0, 0)],
)  # fmt: skip
def test_zero_point(low: float, high: float, step: float, point: int) -> None:
    """The integer that stands for zero: as many steps above 0 as the range has below zero."""
    scale, zero = activation(low, high, symmetric=False, name="x")
    assert float(scale) == pytest.approx(step)
    assert int(zero) == point


@pytest.mark.parametrize(
    "ends", [(np.nan, 1), (0, np.nan), (-np.inf, 1), (0, np.inf), (0, 1e39), (1, -1)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_activation_refuses(ends: tuple[float, float], symmetric: bool) -> None:
    with pytest.raises(OptionError, match="the range of wi/MatMul is"):
        activation(*ends, symmetric=symmetric, name="wi/MatMul")
