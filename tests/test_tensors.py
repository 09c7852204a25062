"""Lazy tensors: safetensors headers that lie, one casting path, hashes that ignore sharding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eptc.errors import CheckpointError
from eptc.tensors import (
    ArrayTensor,
    ComputedTensor,
    SafetensorsFile,
    as_dtype,
    cast,
    content_hash,
    numpy_dtype,
    round_up,
    unit_roundoff,
)


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_type_that_torch_saves(tmp_path: Path) -> None:
    types = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16",
             "float32", "float64")  # fmt: skip
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in types}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(3, 0)
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"format": "pt"})

    file = SafetensorsFile(tmp_path / "x")

    assert file.metadata == {"format": "pt"}
    assert file.keys() == tensors.keys()
    for name, stored in file.items():
        want = tensors[name]
        assert stored.shape == tuple(want.shape)
        assert stored.nbytes == want.numel() * want.element_size()
        assert stored.numpy().dtype == numpy_dtype(stored.dtype)
        np.testing.assert_array_equal(stored.numpy().astype(np.float64), want.double().numpy())


def test_numbers_are_read_anew_and_cannot_be_written_to(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "x")
    tensor = SafetensorsFile(tmp_path / "x")["a"]
    assert tensor.numpy() is not tensor.numpy()
    assert not tensor.numpy().flags.writeable


_OK = _entry()


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        pytest.param(b"", b"", "not JSON", id="no-header"),
        pytest.param(b"\xff\xfe", b"", "not JSON", id="no-text"),
        pytest.param(b"[" * 100_000, b"", "not JSON", id="nested-too-deep"),
        pytest.param([], b"", "not an object", id="list"),
        pytest.param({"a": 1}, b"", "malformed", id="entry-is-a-number"),
        pytest.param({"a": {}}, b"", "malformed", id="entry-is-empty"),
        pytest.param({"a": _entry(shape="x")}, bytes(8), "malformed", id="shape-is-text"),
        pytest.param({"a": _entry(shape=None)}, bytes(8), "malformed", id="no-shape"),
        pytest.param({"a": _entry([[2]])}, bytes(8), "malformed", id="shape-is-nested"),
        pytest.param({"a": {**_OK, "data_offsets": [0]}}, bytes(8), "malformed", id="one-offset"),
        pytest.param({"a": _entry([-2], 0, 8)}, bytes(8), r"shape \[-2\]", id="negative"),
        pytest.param({"a": _entry([-2, -1])}, bytes(8), "shape", id="twice-negative"),
        pytest.param({"a": _entry([3])}, bytes(8), "8 bytes for F32", id="too-few-bytes"),
        pytest.param({"a": _entry([2**62, 4])}, bytes(8), "8 bytes for F32", id="huge"),
        pytest.param({"a": _entry([2], 8, 0)}, bytes(8), "-8 bytes", id="backwards"),
        pytest.param({"a": _entry([2], 8, 16)}, bytes(16), "hole", id="starts-late"),
        pytest.param({"a": _entry([2], -8, 0)}, bytes(8), "hole", id="starts-in-the-header"),
        pytest.param({"a": _OK, "b": _OK}, bytes(8), "overlaps", id="overlap"),
        pytest.param({"a": _OK, "b": _entry([2], 12, 20)}, bytes(20), "hole", id="hole"),
        pytest.param({"a": _OK}, bytes(7), "truncated", id="truncated"),
        pytest.param({"a": _OK}, bytes(9), "16 bytes|truncated", id="trailing-bytes"),
        pytest.param({}, bytes(1), "describes", id="data-without-a-tensor"),
        pytest.param({"a": _entry(dtype="F8_E4M3", end=2)}, bytes(2), "type F8_E4M3", id="float8"),
        pytest.param({"a": _entry(dtype=["F32"])}, bytes(8), "type", id="type-is-a-list"),
        pytest.param({"a": _entry(dtype=None)}, bytes(8), "type None", id="no-type"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        SafetensorsFile(_write(tmp_path / "x", header, data))


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\x10" + bytes(7) + b"{}"])
def test_files_that_are_cut_off(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated"):
        SafetensorsFile(tmp_path / "x")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            SafetensorsFile(path)


@pytest.mark.parametrize("cut", range(1, 90, 8))
def test_every_truncation_is_noticed(tmp_path: Path, cut: int) -> None:
    safetensors.numpy.save_file({"a": np.ones((3, 2), np.float32)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:-cut])
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "x")


def test_a_file_that_shrinks_while_it_is_used(tmp_path: Path) -> None:
    """No bus error: the build ends with a message."""
    safetensors.numpy.save_file({"a": np.ones(4096, np.float32)}, tmp_path / "x")
    tensor = SafetensorsFile(tmp_path / "x")["a"]
    held = tensor.numpy()
    with (tmp_path / "x").open("r+b") as file:
        file.truncate(100)
    assert held.sum() == 4096
    with pytest.raises(CheckpointError, match="became shorter"):
        tensor.numpy()
    (tmp_path / "x").unlink()
    with pytest.raises(Exception, match="cannot be read"):
        tensor.numpy()


def _nearest(value: float, dtype: str) -> Fraction:
    """The element of a type nearest to a number, ties to even, in exact arithmetic."""
    bits, smallest = {"bfloat16": (8, -133), "float16": (11, -24), "float32": (24, -149)}[dtype]
    exact = Fraction(value)
    if exact == 0:
        return exact
    exponent = max(_exponent(abs(exact)) - bits + 1, smallest)
    return round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent


def _exponent(x: Fraction) -> int:
    """Return floor(log2(x))."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


@settings(max_examples=300)
@given(
    st.floats(min_value=-6e4, max_value=6e4),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_casting_rounds_once(value: float, dtype: str) -> None:
    got = cast(np.array([value]), dtype)
    assert got.dtype == numpy_dtype(dtype)
    assert Fraction(float(got[0])) == _nearest(value, dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_bfloat16_is_not_rounded_twice(sign: int) -> None:
    """Just above a tie of bfloat16, by less than float32 can say."""
    value = sign * (1 + 2.0**-8 + 2.0**-40)
    assert float(np.array([value]).astype(ml_dtypes.bfloat16)[0]) == sign * 1.0  # two roundings
    assert float(cast(np.array([value]), "bfloat16")[0]) == sign * (1 + 2.0**-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_casting_keeps_what_is_not_finite(dtype: str) -> None:
    values = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0])
    got = cast(values, dtype).astype(np.float64)
    np.testing.assert_array_equal(got, values)
    assert np.signbit(got).tolist()[3:] == [False, True]


def test_the_same_type_is_not_touched() -> None:
    array = np.ones(3, np.float32)
    assert cast(array, "float32") is array
    tensor = ArrayTensor("a", array)
    assert as_dtype(tensor, "float32") is tensor
    assert as_dtype(tensor, "float16").dtype == "float16"
    assert as_dtype(tensor, "float16").numpy().dtype == np.float16


def test_a_computed_tensor_is_what_it_declares() -> None:
    ones = np.ones((2, 3), np.float32)
    assert ComputedTensor("a", "float32", (2, 3), lambda: ones).numpy() is ones
    for dtype, shape in (("float16", (2, 3)), ("float32", (3, 2))):
        with pytest.raises(AssertionError, match="declared"):
            ComputedTensor("a", dtype, shape, lambda: ones).numpy()


def _tensors() -> list[ArrayTensor]:
    a = ArrayTensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    return [a, ArrayTensor("b", np.array(2.0, ml_dtypes.bfloat16))]


def test_a_hash_does_not_depend_on_the_order() -> None:
    a, b = (np.ascontiguousarray(tensor.array).tobytes() for tensor in _tensors())
    text = b"a\nF32\n2,3\n" + a + b"b\nBF16\n\n" + b
    assert content_hash(_tensors()) == hashlib.sha256(text).hexdigest()
    assert content_hash(reversed(_tensors())) == content_hash(_tensors())
    assert content_hash([]) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: ArrayTensor("c", a.array),
        lambda a: ArrayTensor("a", a.array.reshape(3, 2)),
        lambda a: ArrayTensor("a", a.array.astype(np.float16)),
        lambda a: ArrayTensor("a", a.array + np.float32(1e-6)),
    ],
)
def test_a_hash_depends_on_everything_else(
    change: Callable[[ArrayTensor], ArrayTensor],
) -> None:
    a, b = _tensors()
    assert content_hash([change(a), b]) != content_hash([a, b])


def test_a_hash_of_a_view_is_that_of_its_numbers() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    view = ArrayTensor("a", array.T)
    copy = ArrayTensor("a", np.ascontiguousarray(array.T))
    assert content_hash([view]) == content_hash([copy])


@given(
    value=st.floats(2.0**-126, 2.0**126, width=32),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_rounding_up(value: float, dtype: str) -> None:
    """Never smaller, the nearest number above with those digits, whatever the exponent."""
    found = round_up(np.array([value], np.float32), dtype)
    assert found.dtype == np.float32
    assert found.shape == (1,)
    up = float(found[0])
    assert value <= up <= value * (1 + 2 * unit_roundoff(dtype))
    fraction = np.frexp(up)[0] / unit_roundoff(dtype)
    assert fraction == int(fraction)
    assert round_up(np.asarray(np.float32(up)), dtype) == up
