"""The fp8 numbers: rounded once, half to even, cut off at 448; as two other programs round."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from eptc.errors import BaseModelError, OptionError
from eptc.lower.float8 import FLOAT8, LARGEST, activation_scale, encode, float8, quantize_float8
from eptc.lower.weights import bound
from eptc.parity_gate.float8 import numbers, spacing
from eptc.tensors import ArrayTensor

Array = npt.NDArray[Any]

# Every number of the type but NaN, from the gate's own table, -0 left out.
KNOWN = np.array([n for c, n in enumerate(numbers(np.arange(256))) if n == n and c != 128])


def nearest(x: float) -> float:
    """Return the nearest number of the type, the one with an even last bit where two are."""
    off = np.abs(KNOWN - x)
    return float(min(KNOWN[off == off.min()], key=lambda n: int(n / steps_at(n)) % 2))


def steps_at(number: float) -> float:
    return float(spacing(np.atleast_1d(ml_dtypes.float8_e4m3fn(number)).view(np.uint8))[0])


def test_the_table_is_the_type() -> None:
    """What the gate reads each byte as is what ml_dtypes does, NaN included."""
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(numbers(codes), want)
    positive = want[:127]
    np.testing.assert_array_equal(spacing(codes[:126]), np.diff(positive))
    assert positive.max() == LARGEST


@given(x=st.floats(-500, 500))
@example(x=1 + 2.0**-4 + 2.0**-30)  # by way of float32 it would be half way, and go to 1
@example(x=1 + 2.0**-4)
@example(x=1 + 3 * 2.0**-4)
@example(x=2.0**-10)
@example(x=2.0**-10 + 2.0**-40)
@example(x=3 * 2.0**-10)
@example(x=-1e-300)
@example(x=464.0)
def test_one_rounding_half_to_even(x: float) -> None:
    """float64 to the nearest number there is, at every magnitude; beyond 448 it is 448."""
    got = float(encode(np.array([x]))[0])
    assert got == nearest(max(-LARGEST, min(LARGEST, x)))


def test_what_is_no_number() -> None:
    """Infinity is cut off like everything beyond, NaN stays NaN: the type has no infinity."""
    found = encode(np.array([np.inf, -np.inf, np.nan, 1e300, -449.0]))
    np.testing.assert_array_equal(found.astype(float), [448, -448, np.nan, 448, -448])


@given(
    x=npst.arrays(np.float32, 8, elements=st.floats(-600, 600, width=32)),
    exponent=st.integers(-8, 8),
)
@example(x=np.array([np.nan, 448, 449, -464, 465, 2**-9, 2**-10, 0], np.float32), exponent=0)
def test_as_the_reference_evaluator_rounds(x: Array, exponent: int) -> None:
    """ONNX's own QuantizeLinear, the division exact: the same bytes."""
    scale = 2.0**exponent
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [8])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    evaluator: Any = ReferenceEvaluator(model)
    want = np.asarray(evaluator.run(None, {"x": x * np.float32(scale)})[0])
    got = encode((x * np.float32(scale)).astype(np.float64) / scale).view(np.uint8)
    np.testing.assert_array_equal(numbers(got), numbers(want.view(np.uint8)))
    assert np.isnan(numbers(got)).tolist() == np.isnan(x).tolist()


def matrices() -> st.SearchStrategy[Array]:
    shapes = npst.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=6)
    return npst.arrays(np.float64, shapes, elements=st.floats(-1e30, 1e30))


@given(weight=matrices())
@example(weight=np.zeros((2, 3)))
@example(weight=np.full((2, 2), np.finfo(np.float32).tiny / 1000))
@example(weight=np.full((2, 2), float(np.finfo(np.float32).max)))
def test_a_weight(weight: Array) -> None:
    """Half a step from what it was; the largest is 448, so that nothing is beyond."""
    stored, scale = quantize_float8(weight)
    assert (stored.shape, scale.shape, scale.dtype.name) == (weight.shape, (), "float32")
    assert scale > 0
    codes = stored.view(np.uint8)
    with np.errstate(invalid="ignore"):
        off = np.abs(numbers(codes) - weight / float(scale))
    assert (off <= spacing(codes) / 2).all()
    if np.abs(weight).max() / LARGEST > np.finfo(np.float32).tiny * 1.01:
        assert np.abs(numbers(codes)).max() == LARGEST


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_more_than_is_converted_at_once(dtype: Any) -> None:
    weight = np.random.default_rng(0).normal(size=(300, 500)).astype(dtype)
    stored, scale = quantize_float8(weight)
    want = encode(weight.astype(np.float64) / float(scale))
    np.testing.assert_array_equal(stored.view(np.uint8), want.view(np.uint8))
    assert scale == np.float32(np.abs(weight.astype(np.float64)).max() / LARGEST)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(BaseModelError, match=r"w has numbers that are not finite"):
        quantize_float8(np.array([[1.0, bad]]), name="w")


def test_refuses_what_is_not_finite_behind_the_first_that_is_converted() -> None:
    weight = np.ones((300, 500))
    weight[-1, -1] = np.nan
    with pytest.raises(BaseModelError, match="not finite"):
        quantize_float8(weight)


def test_is_lazy_and_rounds_what_was_before_float32() -> None:
    """A number that float32 would move to half way is rounded from its float64."""
    array = np.array([[448.0, 1 + 2.0**-4 + 2.0**-30]])
    whole = bound(ArrayTensor("w", array), "w")
    assert whole.numpy()[0, 1] == 1 + 2.0**-4
    stored, scale = float8(whole)
    assert (stored.name, stored.dtype, scale.name) == ("w", FLOAT8, "w@scale")
    assert scale.dtype == ir.DataType.FLOAT
    assert stored.numpy().astype(float).tolist() == [[448.0, 1.125]]
    assert stored.nbytes == 2


@pytest.mark.parametrize(
    ("ends", "largest"),
    [((-1.0, 2.0), 2), ((-3.0, 1.0), 3), ((1.0, 2.0), 2), ((-3.0, -1.0), 3), ((0.0, 0.0), 448)],
)
def test_activation_scale(ends: tuple[float, float], largest: float) -> None:
    assert activation_scale(*ends, name="x") == np.float32(largest / 448)


@pytest.mark.parametrize("ends", [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.inf), (1.0, -1.0)])
def test_activation_scale_refuses(ends: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="the range of x is"):
        activation_scale(*ends, name="x")
