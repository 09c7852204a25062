"""Engines whose weights DequantizeLinear reads: sound ones pass, a fault in the file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import eptc
from eptc import lower
from eptc.errors import ParityError
from eptc.parity_gate.reference import load_reference
from eptc.parity_gate.stored import quantized
from eptc.parity_gate.weights import check_weights

Array = npt.NDArray[Any]
Change = Callable[[ir.Graph], None]

Q = "model.layers.1.self_attn.q_proj.weight"  # [64, 64], adapted
OUTPUT = Q.replace("q_proj", "o_proj")
UP = "model.layers.0.mlp.up_proj.weight"
NUMBERS = {"int8-static": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@pytest.fixture(scope="module")
def written(
    recorded: Any, paper: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that gives the bundle of a subject's first task in a precision."""
    made: dict[str, Path] = {}
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    def write(precision: str, name: str = "llama-tiny") -> Path:
        key = f"{name} {precision}"
        if key not in made:
            if not rows.exists():
                texts = [f"a text of {n} and some more words" * (1 + n % 3) for n in range(8)]
                rows.write_text(
                    "\n".join(json.dumps({"sentence": text, "text": text}) for text in texts)
                )
            out = tmp_path_factory.mktemp("stored") / "out"
            subject = paper() if name == "bert" else recorded(name)
            bundle = subject.export(
                out, 0, verify=False, optimize_for="any", precision=precision, calibration=rows
            )
            made[key] = bundle.path
        return made[key]

    return write


@pytest.fixture
def check(recorded: Any) -> Callable[[Path], float]:
    reference = load_reference(recorded("llama-tiny").read())
    return lambda directory: check_weights(directory, ["model.onnx"], reference, 0)


@pytest.mark.parametrize("precision", NUMBERS)
def test_sound(precision: str, written: Any, check: Any) -> None:
    """Every matrix of the layers is there in 8 bits, each the nearest number there is."""
    graph = ir.load(written(precision) / "model.onnx").graph
    found = {weight.name for weight in quantized(graph)}
    assert found == {n for n, v in graph.initializers.items() if _stored(v, precision)}
    assert {Q, OUTPUT, UP} <= found
    assert 0.5 < check(written(precision)) <= 1.0


@pytest.mark.parametrize("precision", NUMBERS)
def test_what_is_turned_afterwards(precision: str, written: Any, paper: Any) -> None:
    """A square weight that a Transpose follows has a row for each output, one scale or many."""
    directory = written(precision, "bert")
    graph = ir.load(directory / "model.onnx").graph
    square = graph.initializers["bert.pooler.dense.weight"]
    assert square.shape is not None
    assert square.shape[0] == square.shape[1]
    turned = _reader(graph, "bert.pooler.dense.weight").outputs[0].consumers()
    assert [node.op_type for node in turned] == ["Transpose"]
    reference = load_reference(paper().read())
    assert 0.5 < check_weights(directory, ["model.onnx"], reference, 0) <= 1.0


def _stored(value: ir.Value, precision: str) -> bool:
    return value.dtype == NUMBERS[precision] and len(value.shape or ()) == 2


def edited(name: str, step: Callable[[Array], Array]) -> Change:
    """Other numbers in an initializer."""

    def change(graph: ir.Graph) -> None:
        value = graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(step(value.const_value.numpy()), order="C"))

    return change


def _reader(graph: ir.Graph, name: str) -> ir.Node:
    return next(n for n in graph.initializers[name].consumers() if n.op_type.startswith("Deq"))


def _other_axis(graph: ir.Graph) -> None:
    _reader(graph, Q).attributes["axis"] = ir.AttrInt64("axis", 0)


def _scale_of_another(graph: ir.Graph) -> None:
    _reader(graph, Q).replace_input_with(1, graph.initializers[f"{OUTPUT}@scale"])


def _asymmetric(graph: ir.Graph) -> None:
    zero = _reader(graph, Q).inputs[2]
    assert zero is not None
    assert zero.const_value is not None
    array = zero.const_value.numpy()
    other = ir.Value(
        name="zero", const_value=ir.tensor((array.astype("f") + 1).astype(array.dtype))
    )
    other.type, other.shape = zero.type, zero.shape
    graph.register_initializer(other)
    _reader(graph, Q).replace_input_with(2, other)


def _computed(graph: ir.Graph) -> None:
    node = _reader(graph, Q)
    doubled = ir.node("Identity", [node.inputs[1]], name="computed")
    graph.insert_before(node, doubled)
    node.replace_input_with(1, doubled.outputs[0])


def _one_bit(array: Array) -> Array:
    codes = array.copy().view(np.uint8)
    codes[3, 5] ^= 2
    found: Array = codes.view(array.dtype)
    return found


def _wider(factor: float) -> Change:
    """Numbers rounded anew in a scale that does not fit them."""

    def change(graph: ir.Graph) -> None:
        stored, scale = (graph.initializers[n].const_value for n in (Q, f"{Q}@scale"))
        assert stored is not None
        assert scale is not None
        numbers = np.clip(stored.numpy().astype("f") / factor, -448, 448)
        edited(Q, lambda _: numbers.astype(ml_dtypes.float8_e4m3fn))(graph)
        edited(f"{Q}@scale", lambda array: array * np.float32(factor))(graph)

    return change


def _no_number(array: Array) -> Array:
    array = array.copy()
    array[1, 2] = np.nan
    return array


FAULTS: dict[str, tuple[str, Change]] = {
    "int8-static, the other axis": ("off at", _other_axis),
    "int8-static, the scale of another weight": ("off at", _scale_of_another),
    "int8-static, an asymmetric zero point": ("off at", _asymmetric),
    "int8-static, a scale that a run computes": ("that a run computes", _computed),
    "int8-static, one bit": ("off at", edited(Q, _one_bit)),
    "fp8, the scale of another weight": ("off at", _scale_of_another),
    "fp8, an asymmetric zero point": ("their zero is 1", _asymmetric),
    "fp8, one bit": ("off at", edited(Q, _one_bit)),
    "fp8, the other way round": ("off at", edited(Q, np.transpose)),
    "fp8, the scale of a weight that is not": ("off at", edited(f"{Q}@scale", lambda s: s * 1.1)),
    "fp8, a scale that is too large": ("too coarse", _wider(64.0)),
    "fp8, a scale that is too small": ("off at", _wider(0.5)),
    "fp8, no number": ("too coarse|off at", edited(Q, _no_number)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_fault(what: str, written: Any, check: Any, tmp_path: Path) -> None:
    words, change = FAULTS[what]
    model = ir.load(written(what.partition(",")[0]) / "model.onnx")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    change(model.graph)
    lower.write({"model": model}, tmp_path)
    with pytest.raises(ParityError, match=words) as raised:
        check(tmp_path)
    assert Q in raised.value.found


def test_a_fault_stops_the_build(
    recorded: Any, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder of fp8 that rounds to zero, not to the nearest: nothing is published."""

    def truncated(numbers: Array) -> Array:
        near = np.clip(numbers, -448, 448).astype(np.float32).view(np.uint32)
        found: Array = (near & 0xFFF00000).view(np.float32).astype(ml_dtypes.float8_e4m3fn)
        return found

    monkeypatch.setattr("eptc.lower.float8.encode", truncated)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"sentence": "some text"}))
    with pytest.raises(ParityError, match=r"the weight model\.layers.* in the engine is off at"):
        recorded("llama-tiny").export(
            tmp_path / "out", 0, optimize_for="any", precision="fp8", calibration=rows
        )
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert eptc.verify(written("fp8"))
