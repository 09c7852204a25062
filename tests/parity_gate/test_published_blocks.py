"""Blocks of an int8 engine as they are published: faults that float32 activations do not show."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from eptc.bundle import write_manifest
from eptc.errors import ParityError
from eptc.lower.edit import constant, insert
from eptc.parity_gate import ParityReport, refuse
from eptc.runtime.manifest import read_manifest


@pytest.fixture(scope="module")
def written(recorded: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the int8 bundle of a recorded checkpoint's first task."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("published") / name
            made[name] = recorded(name).export(out, 0, verify=False, precision="int8").path
        return made[name]

    return write


@pytest.fixture
def check(recorded: Any, prove_by_block: Any) -> Callable[[str, Path], ParityReport]:
    return lambda name, directory: prove_by_block(recorded(name), directory)


def step_of_more(model: ir.Model, weight: str) -> None:
    """Let the step of what a weight multiplies be that of far larger numbers beside it.

    Before: q, s, z = DynamicQuantizeLinear(x)
    After:  r, s, z = DynamicQuantizeLinear(Concat(x, 1e5)), q = Slice(r)
    """
    value = model.graph.initializers[weight]
    while (product := next(iter(value.consumers()))).op_type != "MatMulInteger":
        value = product.outputs[0]
    (cast,) = product.outputs[0].consumers()
    (scaled,) = cast.outputs[0].consumers()
    steps = scaled.inputs[1]
    assert product.inputs[0] is not None
    assert steps is not None
    rounding, both = product.inputs[0].producer(), steps.producer()
    assert rounding is not None
    assert both is not None

    def number(value: float) -> ir.Value:
        return constant(model.graph, np.array(value, np.float32))

    def ends(*numbers: int) -> list[ir.Value]:
        return [constant(model.graph, np.array([n], np.int64)) for n in numbers]

    x = rounding.inputs[0]
    column = insert(product, "Slice", [x, *ends(0, 1, -1)]).outputs[0]
    none = insert(product, "Mul", [column, number(0)]).outputs[0]
    far = insert(product, "Add", [none, number(1e5)]).outputs[0]
    wider = insert(product, "Concat", [x, far], {"axis": -1}).outputs[0]
    whole, step, zero = insert(product, rounding.op_type, [wider], outputs=3).outputs
    whole.type = zero.type = None  # not that of what is rounded
    cut = insert(product, "Slice", [whole, *ends(0, -1, -1)]).outputs[0]
    product.replace_input_with(0, cut)
    product.replace_input_with(2, zero)
    both.replace_input_with(both.inputs.index(rounding.outputs[1]), step)


# What multiplies too coarse an activation: subject, graph, weight, the block that shows it.
COARSE = {
    "a product": ("llama-tiny", "model", "model.layers.1.mlp.down_proj.weight", "model.layers.1"),
    "values that the other graph reads": (
        "t5-gated-tiny", "encoder", "decoder.block.0.layer.1.EncDecAttention.v.weight",
        "decoder.block.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COARSE)
def test_step_of_another_range(written: Any, check: Any, tmp_path: Path, what: str) -> None:
    """Weights and their use are right, and what the published nodes compute is not."""
    name, graph, weight, block = COARSE[what]
    directory = tmp_path / "copy"
    shutil.copytree(written(name), directory)
    model = ir.load(directory / f"{graph}.onnx")
    step_of_more(model, weight)
    ir.save(model, directory / f"{graph}.onnx")
    write_manifest(directory, dataclasses.replace(read_manifest(directory), files={}))
    report = check(name, directory)
    assert [c.explain() for c in report.tensors if not c.passed] == []
    assert report.published is not None
    assert {c.what.split(",")[0] for c in report.published.tensors if not c.passed} == {
        f"{block} as published"
    }
    with pytest.raises(ParityError, match=f"first: {block} as published") as raised:
        refuse(report, "somewhere")
    assert "at most 0.5 of the largest" in str(raised.value)


def test_what_ran_is_recorded(written: Any, check: Any) -> None:
    """Each block in every way, within its bound; the weights' own rounding is no part of it."""
    report = check("llama-tiny", written("llama-tiny"))
    refuse(report, "nothing is wrong with it")
    assert report.published is not None
    compared = {c.what.replace(" as published", "") for c in report.published.tensors}
    assert compared == {c.what for c in report.tensors if not c.what.startswith("what comes bef")}
    said = report.summary()["as_published"]
    assert said["tensors"] == len(compared) == len(report.to_json()["as_published"]["tensors"])
    assert 0 < said["largest_error"] < 0.2 * said["its_bound"]
    assert all(c.cosine > 0.999 for c in report.published.tensors)


def test_float32_that_rounds(written: Any, check: Any, tmp_path: Path) -> None:
    """An engine that says it is float32 may not round activations."""
    directory = tmp_path / "copy"
    shutil.copytree(written("llama-tiny"), directory)
    manifest = dataclasses.replace(read_manifest(directory), precision="fp32")
    write_manifest(directory, manifest)
    report = check("llama-tiny", directory)
    with pytest.raises(ParityError, match=r"first: model.layers.0 as published"):
        refuse(report, "somewhere")
