"""Every pass of the registry keeps the rules that all passes share."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import onnx_ir
import pytest

import eptc.passes
from eptc.ir import AdaptedModel
from eptc.linear_probe import LinearProbe
from eptc.pass_base import AdapterPass, GraphPass
from eptc.pipeline import (
    adapter_passes,
    factoring_passes,
    freezing_passes,
    graph_passes,
    lossy_passes,
    stacking_passes,
)
from eptc.precision import SCHEMES, OptimizeFor, Precision
from eptc.precision_plan import PrecisionPlan
from eptc.registry import PASSES, find_pass, passes_table
from eptc.run_passes import check_graph, run_adapter_passes
from eptc.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
REQUIRED: dict[str, dict[str, Any]] = {
    "stack-tasks": {"task_ids": (0, 1)},
    "specialize-router": {"task_id": 1},
    "freeze-router": {"gates": {"b": [0.5, 0.25, 0.25]}, "spread": {"b": [0.1, 0.1, 0.0]}},
    "truncate-rank": {"max_rank": 1},
}
# Options of which JSON has a digest only, as they were.
DIGESTED: dict[str, dict[str, Any]] = {
    "quantize-int8-static": {"ranges": {}},
    "quantize-qdq": {"ranges": {}},
}

GRAPH = (
    '<ir_version: 10, opset_import: ["" : 20]> g (float[batch,3] x) => (float[batch,3] y) '
    "<float[3,3] W = {1, 2, 3, 4, 5, 6, 7, 8, 9}> "
    "{ t = Transpose <perm = [1, 0]> (W) p = MatMul(x, t) y = Relu(p) }"
)


def instance(name: str) -> AdapterPass | GraphPass:
    return find_pass(name)(**REQUIRED.get(name, {}))


@pytest.mark.parametrize("name", PASSES)
def test_declaration(name: str) -> None:
    """Name, contract, frozen options that JSON can say, Before and After in the docstring."""
    step = instance(name)
    assert step.name == name
    assert step.contract in ("exact", "lossy")
    assert dataclasses.is_dataclass(step)
    assert json.loads(json.dumps(step.options())) == step.options()
    assert find_pass(name)(**{**step.options(), **DIGESTED.get(name, {})}) == step
    assert repr(step).startswith(type(step).__name__)
    doc = type(step).__doc__ or ""
    assert "Before:" in doc
    assert "After:" in doc
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", [n for n in PASSES if issubclass(find_pass(n), AdapterPass)])
def test_adapter_pass_is_valid_and_idempotent(name: str, model: AdaptedModel) -> None:
    """From every state of the pipelines: valid, within its contract, a second run no-op."""
    states = []
    for pipeline in (adapter_passes(1), factoring_passes(1, 2)):
        states.append(model)
        for earlier in pipeline:
            states.append(earlier.rewrite(states[-1]))
    step = instance(name)
    assert isinstance(step, AdapterPass)
    for state in states:
        after, _ = run_adapter_passes(state, [step], task_id=1, probe=LinearProbe())
        assert step.rewrite(after) is after


@pytest.mark.parametrize("name", [n for n in PASSES if issubclass(find_pass(n), GraphPass)])
def test_graph_pass_is_valid_and_idempotent(name: str) -> None:
    """Valid, interface kept, a second run changes no byte."""
    graph = onnx_ir.from_onnx_text(GRAPH)
    interface = [(v.name, str(v.shape)) for v in (*graph.graph.inputs, *graph.graph.outputs)]
    step = instance(name)
    assert isinstance(step, GraphPass)
    step(graph)
    check_graph(graph)
    assert [
        (v.name, str(v.shape)) for v in (*graph.graph.inputs, *graph.graph.outputs)
    ] == interface
    before = onnx_ir.to_proto(graph).SerializeToString(deterministic=True)
    assert not step(copy.copy(graph)).modified
    assert onnx_ir.to_proto(graph).SerializeToString(deterministic=True) == before


def test_no_file_is_an_orphan() -> None:
    """Each file of the folder is one registered pass, each pass has a test file of its name."""
    files = {p.stem for p in Path(eptc.passes.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == {name.replace("-", "_") for name in PASSES}
    for name in files:
        assert (ROOT / "tests" / "passes" / f"test_{name}.py").is_file()


def test_default_pipelines_are_registered() -> None:
    """The pipelines run exactly the registered exact passes, in the registry's order."""
    frozen = [step.name for step in freezing_passes({}, {})]
    factored = [step.name for step in factoring_passes(0, 1)]
    stacked = [step.name for step in stacking_passes((0, 1))]
    used = {*frozen, *factored, *stacked}
    for names in (frozen, factored, stacked):
        assert names == [name for name in PASSES if name in names]
    targets = {name: each.graph_passes for name, each in TARGETS.items()}
    for provider, precision, target in itertools.product(
        get_args(OptimizeFor), get_args(Precision), targets
    ):
        names = [step.name for step in adapter_passes(0)]
        names += [step.name for step in graph_passes(provider, precision, targets[target])]
        if SCHEMES[precision].lossy:
            assert names.pop() == "stable-names"  # it comes again, last
            plan = PrecisionPlan({}) if precision == "auto" else None
            seen: Any = {"ranges": {"model": {}}, "extremes": {"model": {}}}
            steps = lossy_passes(precision, provider, plan=plan, **seen)
            names += [(s["model"] if isinstance(s, Mapping) else s).name for s in steps]
        assert names == [name for name in PASSES if name in names]
        used.update(names)
    assert used == set(PASSES)


def test_readme_has_the_table() -> None:
    """The README's table of passes is the generated one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert passes_table() in readme, f"put this into README.md:\n{passes_table()}"
