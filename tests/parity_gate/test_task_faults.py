"""Faults in an engine of several tasks: what one task's own gate cannot see among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import eptc
from eptc import lower
from eptc.describe import describe as describe_soundly
from eptc.errors import ParityError
from eptc.ir import AdaptedModel
from eptc.lower.edit import constant, insert
from eptc.lower.weights import STACKED
from eptc.parity_gate import several
from eptc.passes.stack_tasks import StackTasks
from eptc.runtime import manifest, row_tasks
from eptc.tensors import ArrayTensor

Insert = Callable[..., None]


@pytest.fixture
def failure(small_native: Any, tmp_path: Path) -> Callable[[], str]:
    """Return a function that builds an engine of all tasks and gives what the gate says."""

    def build() -> str:
        with pytest.raises(ParityError) as caught:
            eptc.export(
                small_native.ckpt, base=small_native.base, task="all", out=tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return build


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Return a function that puts a fault around the lowering of tasks."""

    def put(fault: Callable[..., None]) -> None:
        sound = lower.insert_tasks

        def insert_tasks(model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
            fault(sound, model, adapters, heads, task_ids)

        monkeypatch.setattr(lower, "insert_tasks", insert_tasks)

    return put


def _order(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
    """Low ranks and heads stand in another order than the tasks."""
    first, second, third = task_ids
    sound(model, adapters, [heads[1], heads[0], heads[2]], [second, first, third])


def _linears(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
    """Low ranks of two tasks are exchanged; heads are not."""
    first, second, third = task_ids
    sound(model, adapters, heads, [second, first, third])


def _heads(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
    """Two tasks with as many labels have each other's head."""
    sound(model, adapters, [heads[1], heads[0], heads[2]], task_ids)


def _stack(name: str, change: Callable[[Any], None]) -> Callable[..., None]:
    def fault(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
        sound(model, adapters, heads, task_ids)
        (value,) = [v for n, v in model.graph.initializers.items() if name in n]
        array = value.const_value.numpy().copy()
        change(array)
        value.const_value = ir.tensor(array, name=value.name)

    return fault


def _scaled(array: Any) -> None:
    array[2] *= 1.01


def _rows_scaled(array: Any) -> None:
    array[2, :-1] *= 1.01  # behind them is the bias


def _bias_moved(array: Any) -> None:
    array[1, -1, 0] += 1e-4


def _wider(array: Any) -> None:
    array[2, ..., 1] = 0.5  # the regression has one output


STORED = {
    "order of all": (_order, "with what task tone adds"),
    "order of low ranks": (_linears, "with what task tone adds"),
    "heads exchanged": (_heads, "classifier.weight of task tone"),
    "B of one task": (
        _stack(f"attention.self.value{STACKED}B", _rows_scaled),
        "attention.self.value.weight, with what task score adds",
    ),
    "bias behind B": (
        _stack(f"attention.self.value{STACKED}B", _bias_moved), "attention.self.value.bias",
    ),
    "A of one task": (
        _stack(f"intermediate.dense{STACKED}A", _scaled),
        "intermediate.dense.weight, with what task score adds",
    ),
    "head of one task": (
        _stack(f"classifier{STACKED}weight", _scaled), "classifier.weight of task score",
    ),
    "beyond a head": (
        _stack(f"classifier{STACKED}weight", _wider), "goes beyond its 1 outputs",
    ),
    "bias of one task": (
        _stack(f"classifier{STACKED}bias", _scaled), "classifier.bias of task score",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", STORED)
def test_what_is_stored(plant: Any, failure: Callable[[], str], what: str) -> None:
    fault, words = STORED[what]
    plant(fault)
    assert words in failure()


def _lost(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
    """One linear is left as the base has it."""
    left = {path: a for path, a in adapters.items() if not path.endswith("value")}
    sound(model, left, heads, task_ids)


def _others(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
    """A linear has low ranks that the checkpoint does not adapt."""
    path = "bert.pooler.dense"
    donor = next(a for p, a in adapters.items() if p.endswith("query"))
    sound(model, {**adapters, path: dataclasses.replace(donor, target=path)}, heads, task_ids)


def test_linears_that_are_missing(plant: Any, failure: Callable[[], str]) -> None:
    plant(_lost)
    assert "attention.self.value.weight, with what task tone adds" in failure()


def test_linears_that_are_too_many(plant: Any, failure: Callable[[], str]) -> None:
    plant(_others)
    assert "stacks bert.pooler.dense" in failure()


def _ids(model: ir.Model) -> ir.Value:
    """Return the places that what is stacked is gathered by."""
    gathers = [
        node
        for node in model.graph
        if node.op_type == "Gather" and STACKED in str(getattr(node.inputs[0], "name", ""))
    ]
    (ids,) = {node.inputs[1] for node in gathers}
    assert ids is not None
    return ids


def _replaced(ids: ir.Value, other: ir.Value) -> None:
    other.type, other.shape = ids.type, ids.shape
    for node, index in tuple(ids.uses()):
        if node.op_type == "Gather" and STACKED in str(getattr(node.inputs[0], "name", "")):
            node.replace_input_with(index, other)


def _after(change: Callable[[ir.Model, ir.Value], ir.Value]) -> Callable[..., None]:
    def fault(sound: Insert, model: Any, adapters: Any, heads: Any, task_ids: Any) -> None:
        sound(model, adapters, heads, task_ids)
        ids = _ids(model)
        _replaced(ids, change(model, ids))

    return fault


def _next(model: ir.Model, ids: ir.Value) -> ir.Value:
    """Every row has the task after its own."""
    node = next(n for n in model.graph if n.op_type == "Gather" and ids in n.inputs)
    after = constant(model.graph, np.array([1, 2, 0], np.int64))
    return insert(node, "Gather", [after, ids], path="fault").outputs[0]


def _first_rows(model: ir.Model, ids: ir.Value) -> ir.Value:
    """Every row has the task of the first."""
    node = next(n for n in model.graph if n.op_type == "Gather" and ids in n.inputs)
    zero = constant(model.graph, np.array([0], np.int64))
    first = insert(node, "Gather", [ids, zero], path="fault").outputs[0]
    first.type, first.shape = ids.type, ir.Shape([1])
    shape = insert(node, "Shape", [ids], path="fault").outputs[0]
    shape.type, shape.shape = ids.type, ir.Shape([1])
    return insert(node, "Expand", [first, shape], path="fault").outputs[0]


def _reversed(model: ir.Model, ids: ir.Value) -> ir.Value:
    """Rows have one another's tasks."""
    node = next(n for n in model.graph if n.op_type == "Gather" and ids in n.inputs)
    starts, ends, steps = (
        constant(model.graph, np.array([n], np.int64)) for n in (-1, -(2**40), -1)
    )
    axes = constant(model.graph, np.array([0], np.int64))
    return insert(node, "Slice", [ids, starts, ends, axes, steps], path="fault").outputs[0]


def _unmapped(model: ir.Model, ids: ir.Value) -> ir.Value:  # noqa: ARG001  # as the others
    """Negative places count from the end."""
    return next(value for value in model.graph.inputs if value.name == "task_ids")


def test_the_task_after_ones_own(plant: Any, failure: Callable[[], str]) -> None:
    plant(_after(_next))
    assert "output tensors differ" in failure()


@pytest.mark.parametrize("change", [_first_rows, _reversed])
def test_only_rows_of_several_tasks_show_it(
    plant: Any, failure: Callable[[], str], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task by itself passes: what is wrong is whose rows are whose."""
    reports: list[Any] = []
    sound = several.prove_tasks

    def noted(*given: Any, **options: Any) -> Any:
        reports.append(sound(*given, **options))
        return reports[-1]

    monkeypatch.setattr("eptc.parity_gate.verifier.prove_tasks", noted)
    plant(_after(change))
    assert "output tensors differ" in failure()
    assert all(part.passed for part in reports[0].tasks.values())
    assert not reports[0].mixed.passed
    assert not reports[0].passed


def test_negative_places(plant: Any, failure: Callable[[], str]) -> None:
    plant(_after(_unmapped))
    assert "answers a row of task -1" in failure()


# ---- before and after the graph


def _spoiled(model: AdaptedModel, task_id: int, sound: StackTasks) -> AdaptedModel:
    stacked = sound_rewrite(sound, model)
    path, adapter = sorted(stacked.adapters.items())[0]
    branches = []
    for branch in adapter.branches:
        delta: Any = branch.delta
        if branch.gate.task_id == task_id:  # type: ignore[union-attr]
            spoiled = ArrayTensor(delta.B.name, delta.B.numpy() * np.float32(1.001))
            delta = dataclasses.replace(delta, B=spoiled)
        branches.append(dataclasses.replace(branch, delta=delta))
    changed = dataclasses.replace(adapter, branches=tuple(branches))
    return stacked.replace(adapters={**stacked.adapters, path: changed})


sound_rewrite = StackTasks.rewrite


@pytest.mark.parametrize("task_id", [0, 1, 2])
def test_the_pass_is_measured_for_every_task(
    failure: Callable[[], str], monkeypatch: pytest.MonkeyPatch, task_id: int
) -> None:
    monkeypatch.setattr(StackTasks, "rewrite", lambda self, model: _spoiled(model, task_id, self))
    assert "the pass stack-tasks is exact, but moved" in failure()


def test_the_layer_gate_asks_for_every_task(
    failure: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that says it is lossy is not measured, but compared with the reference."""
    monkeypatch.setattr(StackTasks, "contract", "lossy")
    monkeypatch.setattr(StackTasks, "rewrite", lambda self, model: _spoiled(model, 2, self))
    assert "after the pass stack-tasks, for task 2" in failure()


def test_tasks_exchanged_in_the_manifest(
    failure: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(source: Any, task_ids: Sequence[int], *given: Any, **options: Any) -> Any:
        found = describe_soundly(source, task_ids, *given, **options)
        return dataclasses.replace(found, tasks=(found.tasks[1], found.tasks[0], found.tasks[2]))

    monkeypatch.setattr("eptc.compiled.describe", describe)
    assert "the engine's tasks are ['same', 'tone', 'score']" in failure()


def test_a_task_described_wrong(
    failure: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(*given: Any, **options: Any) -> Any:
        found = describe_soundly(*given, **options)
        wrong = dataclasses.replace(found.tasks[0], labels=("good", "bad"))
        return dataclasses.replace(found, tasks=(wrong, *found.tasks[1:]))

    monkeypatch.setattr("eptc.compiled.describe", describe)
    assert "the engine's task is" in failure()


def test_the_runtime_tells_rows_apart(
    failure: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template of another task: seen in the ids of its own texts."""
    sound = row_tasks.RowTasks.at

    def at(self: Any, places: Any) -> Any:
        found = sound(self, places)
        return [
            dataclasses.replace(task, prompt="x {text}") if task and task.name == "score" else task
            for task in found
        ]

    monkeypatch.setattr(row_tasks.RowTasks, "at", at)
    assert "differs from the training tokenizer" in failure()
    assert manifest.SCHEMA_VERSION == 3


def test_a_base_weight(failure: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    sound = lower.bind
    name = "bert.encoder.layer.0.attention.self.query.weight"

    def bind(graphs: Mapping[str, ir.Model], weights: Mapping[str, Any]) -> None:
        array = weights[name].numpy().copy()
        array[0, 0] = np.nextafter(array[0, 0], np.float32(9))
        sound(graphs, {**weights, name: ArrayTensor(name, array)})

    monkeypatch.setattr(lower, "bind", bind)
    assert f"the weight {name} in the engine is not the base's" in failure()
