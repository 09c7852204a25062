"""The twin rounds exactly where 16 bits round: against numpy's own rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from eptc.calibration import round_values, simulated
from eptc.errors import BundleError
from eptc.passes.cast_half import CastHalf
from eptc.run_passes import check_graph
from eptc.runtime import Engine, load_manifest

Float32 = npt.NDArray[np.float32]

HALF: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROWS = 50
# Operators whose float32 result numpy gives to the bit, so that only roundings are compared.
BODY = (
    "e = Gather(E, ids) s = Add(e, x) t = Transpose <perm = [1, 0]> (s) p = Mul(t, t) "
    "q = Relu(p) present.0.key = Sub(q, past_key_values.0.key) y = Mul(present.0.key, half)"
).replace(".", "_")


def numbers() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.integers(-6, 5, (4, ROWS))
    past = rng.normal(size=(ROWS, 4)).astype(np.float32)
    return {
        "E": rng.normal(size=(9, ROWS)).astype(np.float32),
        "ids": np.array([3, 0, 8, 3]),
        "x": (rng.normal(size=(4, ROWS)) * scale).astype(np.float32),
        "past": past,
    }


def model(table: Float32) -> ir.Model:
    m = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g '
        f"(int64[4] ids, float[4,{ROWS}] x, float[{ROWS},4] past_key_values_0_key) => "
        f"(float[{ROWS},4] y, float[{ROWS},4] present_0_key) <float half = {{0.3}}, "
        f"float[9,{ROWS}] E = {{{', '.join(map(repr, table.ravel().tolist()))}}}> {{ {BODY} }}"
    )
    for value in (*m.graph.inputs, *m.graph.outputs):
        value.name = str(value.name).replace("_0_", ".0.")
    return m


def rounded(array: Any, dtype: str) -> Float32:
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(HALF[dtype]).astype(np.float32)


def by_hand(given: dict[str, Any], dtype: str) -> tuple[Float32, Float32]:
    """Return y and present as 16-bit hardware computes them: each result rounded once."""
    table, x, past = (rounded(given[name], dtype) for name in ("E", "x", "past"))
    with np.errstate(over="ignore", invalid="ignore"):
        summed = rounded(table[given["ids"]] + x, dtype).T
        squared = rounded(summed * summed, dtype)
        present = rounded(np.maximum(squared, 0) - past, dtype)
        return rounded(present * rounded(0.3, dtype), dtype), present


def run(m: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    """Run with every optimisation that ONNX Runtime has."""
    session = onnxruntime.InferenceSession(
        ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


@pytest.mark.parametrize("dtype", HALF)
def test_equals_rounding_by_hand(dtype: Any) -> None:
    """Bit for bit, from numbers below the smallest to such as overflow."""
    given = numbers()
    m = model(given["E"])
    CastHalf(dtype)(m)
    # The weight, x, five results and the last: what is moved is not rounded again.
    assert round_values(m) == 6
    check_graph(m)
    assert {v.dtype for v in (*m.graph.inputs, *m.graph.outputs)} == {
        ir.DataType.FLOAT, ir.DataType.INT64,
    }  # fmt: skip
    past = rounded(given["past"], dtype)
    y, present = run(m, {"ids": given["ids"], "x": given["x"], "past_key_values.0.key": past})
    want_y, want_present = by_hand(given, dtype)
    np.testing.assert_array_equal(present.view(np.uint32), want_present.view(np.uint32))
    np.testing.assert_array_equal(y.view(np.uint32), want_y.view(np.uint32))
    if dtype == "float16":
        assert np.isinf(present).any()  # overflow shows
        assert np.isfinite(present).any()


def test_cpu_provider_rounds_elsewhere() -> None:
    """Why there is a twin: ONNX Runtime computes the float16 graph itself otherwise."""
    given = numbers()
    m = model(given["E"])
    CastHalf()(m)
    past = given["past"].astype(np.float16)
    _, present = run(m, {"ids": given["ids"], "x": given["x"], "past_key_values.0.key": past})
    _, want = by_hand(given, "float16")
    assert not np.array_equal(present.astype(np.float32), want)


def test_float32_is_left_alone() -> None:
    m = model(numbers()["E"])
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    assert round_values(m) == 0
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("dtype", HALF)
def test_bundle(classifier: Path, tmp_path: Path, halve: Any, dtype: str) -> None:
    """An engine like any other, whose weights are the very same file; twice the same bytes."""
    half = halve(classifier, tmp_path / "half", dtype)
    written = simulated(half, tmp_path / "twin")
    again = simulated(half, tmp_path / "again")
    assert written == again == load_manifest(tmp_path / "twin")
    assert (tmp_path / "twin/weights.bin").read_bytes() == (half / "weights.bin").read_bytes()
    assert (half / "weights.bin").stat().st_size < 0.6 * (
        (classifier / "weights.bin").stat().st_size
    )
    for path in (tmp_path / "twin").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    texts = [{"text": "the film was good"}, {"text": "a dull , long film"}]
    with Engine.load(classifier) as exact, Engine.load(tmp_path / "twin") as twin:
        want, got = (engine.run(engine.tokenize(texts))["logits"] for engine in (exact, twin))
    bound = {"float16": 4e-3, "bfloat16": 4e-2}[dtype]
    assert 0 < np.abs(got - want).max() < bound * np.abs(want).max()


def test_nothing_to_simulate(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="computes nothing in 16 bits"):
        simulated(classifier, tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
