"""Run passes one after another: validate after each, check its contract, record what it did."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import onnx
import onnx_ir

from eptc.contract import measure
from eptc.errors import EptcError, InternalError, PluginError
from eptc.ir import AdaptedModel
from eptc.linear_probe import LinearProbe
from eptc.lower.strong_types import check_types
from eptc.lower.weights import to_proto
from eptc.node_makers import sign
from eptc.pass_base import AdapterPass, GraphPass
from eptc.passes.stable_names import StableNames

__all__ = ["PassRecord", "Step", "check_graph", "run_adapter_passes", "run_graph_passes"]


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Args:
        name: the pass.
        options: its options as JSON values.
        contract: what it promises about the numbers.
        changed: whether anything changed.
        before: sizes before it (what is counted depends on the stage).
        after: sizes after it.
        error: largest deviation it caused, as a fraction of its bound; None where the contract
            was not measured.
        bound: the largest of those bounds, as a fraction of the largest output of its linear;
            None likewise.
        seconds: how long it took, checks not counted.
        origin: whose pass it is, a package and its version; None: eptc's own.
    """

    name: str
    options: Mapping[str, Any]
    contract: str
    changed: bool
    before: Mapping[str, int]
    after: Mapping[str, int]
    error: float | None
    seconds: float
    origin: str | None = None
    bound: float | None = None

    @property
    def label(self) -> str:
        """What the pass is called in messages."""
        return _label(self.name, self.origin)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values, without the clock: the same on every run."""
        data = dataclasses.asdict(self)
        del data["seconds"]
        if self.origin is None:
            del data["origin"]
        for name in ("error", "bound"):
            if data[name] is not None:
                # Two digits: the others depend on the processor.
                data[name] = float(f"{data[name]:.1e}")
        if self.bound is None:
            del data["bound"]
        return data


# A pass for all graphs of an engine, or one for each.
Step = GraphPass | Mapping[str, GraphPass]

# Constants up to this many bytes stay in a graph that is checked: shape inference reads them.
_SMALL = 1024

_MISTAKES: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, LookupError, TypeError, ValueError,
)  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")
AfterAdapterPass = Callable[[PassRecord, AdaptedModel], None]


def run_adapter_passes(
    model: AdaptedModel,
    passes: Iterable[AdapterPass],
    *,
    task_id: int | Sequence[int],
    probe: LinearProbe | None,
    after: AfterAdapterPass | None = None,
    origins: Mapping[str, str] | None = None,
) -> tuple[AdaptedModel, list[PassRecord]]:
    """Run passes over the adapter IR.

    Args:
        model: the model to start from.
        passes: what to run, in order.
        task_id: the task, or each task, for which the model before and after each pass is
            compared.
        probe: checks contracts on every adapted linear; None: they are taken at their word.
        after: called with each record and the model the pass made.
        origins: packages of passes that are not eptc's own, by the name of the pass.

    Raises:
        InternalError: a pass broke a rule of the IR; it is named.
        PluginError: a pass of another package did, or failed.
        ParityError: a pass broke its contract; it and the first linear are named.
    """
    model.validate()
    task_ids = (task_id,) if isinstance(task_id, int) else tuple(task_id)
    records = []
    for step in passes:
        origin = (origins or {}).get(step.name)
        label = _label(step.name, origin)
        start = time.perf_counter()
        rewritten = _guarded(label, origin, step.rewrite, model)
        seconds = time.perf_counter() - start
        _guarded(label, origin, AdaptedModel.validate, rewritten)
        error, bound = None, None
        if probe is not None:
            error, bound = _guarded(
                label, origin, measure, step, label, model, rewritten, task_ids, probe
            )
        records.append(
            PassRecord(
                step.name, step.options(), step.contract, rewritten is not model,
                _adapter_sizes(model), _adapter_sizes(rewritten), error, seconds, origin, bound,
            )
        )  # fmt: skip
        model = rewritten
        if after is not None:
            after(records[-1], model)
    return model, records


def run_graph_passes(
    graphs: Mapping[str, onnx_ir.Model],
    passes: Sequence[Step],
    origins: Mapping[str, str] | None = None,
) -> list[PassRecord]:
    """Run passes over every graph in place.

    Args:
        graphs: by name.
        passes: in order; one for all graphs, or the same pass with other options for each graph.
        origins: packages of passes that are not eptc's own, by the name of the pass.

    Raises:
        InternalError: a pass made a graph invalid or changed its interface; both are named.
        PluginError: a pass of another package did, or failed.
    """
    records = []
    sign(graphs)
    for given in passes:
        before, start = _graph_sizes(graphs), time.perf_counter()
        changed = False
        steps = given if isinstance(given, Mapping) else dict.fromkeys(graphs, given)
        for key, graph in graphs.items():
            step = steps[key]
            origin = (origins or {}).get(step.name)
            label = f"{_label(step.name, origin)} on {key}"
            interface = _interface(graph, types=not step.retypes)
            changed |= _guarded(label, origin, step, graph).modified
            changed_interface = _interface(graph, types=not step.retypes) != interface
            if step.name != StableNames.name and changed_interface:
                raise _bug(
                    f"the pass {_label(step.name, origin)} changed the interface of {key}", origin
                )
            _guarded(label, origin, check_graph, graph)
        seconds = time.perf_counter() - start
        sign(graphs, f"the pass {_label(step.name, origin)}")
        options = (
            {key: step.options() for key, step in given.items()}
            if isinstance(given, Mapping)
            else given.options()
        )
        records.append(
            PassRecord(
                step.name, options, step.contract, changed, before, _graph_sizes(graphs), None,
                seconds, origin,
            )
        )  # fmt: skip
    return records


def _label(name: str, origin: str | None) -> str:
    return name if origin is None else f"{name} of {origin}"


def _bug(found: str, origin: str | None) -> EptcError:
    if origin is None:
        return InternalError(found)
    return PluginError(found, fix=f"report it to the authors of {origin}, or leave the pass out")


def _guarded(
    label: str, origin: str | None, action: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Run an action; an unexpected error names the pass."""
    # Out of another package's pass anything may come.
    mistakes = _MISTAKES if origin is None else (Exception,)
    try:
        return action(*args, **kwargs)
    except InternalError as error:
        raise _bug(f"the pass {label} broke the model: {error.found}", origin) from error
    except (EptcError, MemoryError):
        raise
    except mistakes as error:
        found = f"the pass {label} failed: {type(error).__name__}: {error}"
        raise _bug(found, origin) from error


def _adapter_sizes(model: AdaptedModel) -> dict[str, int]:
    branches = [branch for adapter in model.adapters.values() for branch in adapter.branches]
    tensors = {id(t): t.nbytes for branch in branches for t in branch.delta.tensors}
    return {"branches": len(branches), "adapter_bytes": sum(tensors.values())}


def _graph_sizes(graphs: Mapping[str, onnx_ir.Model]) -> dict[str, int]:
    weights = {}
    for graph in graphs.values():
        for value in graph.graph.initializers.values():
            if value.const_value is not None:
                weights[value.name] = value.const_value.nbytes
    return {
        "nodes": sum(len(graph.graph) for graph in graphs.values()),
        "weight_bytes": sum(weights.values()),
    }


def _interface(graph: onnx_ir.Model, *, types: bool) -> tuple[Any, ...]:
    return tuple(
        (value.name, str(value.dtype) if types else None, str(value.shape))
        for side in (graph.graph.inputs, graph.graph.outputs)
        for value in side
    )


def check_graph(model: onnx_ir.Model) -> None:
    """Check a graph with onnx.checker, full shape inference and the types its operators know.

    No weight is read.

    Raises:
        InternalError: the graph is not valid.
    """
    check_types(model)
    light = onnx_ir.Model(model.graph.clone(), ir_version=model.ir_version)
    for name, value in list(light.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL:
            continue
        del light.graph.initializers[name]
        value.const_value = None
        value.shape, value.dtype = (
            onnx_ir.Shape([n if isinstance(n, int) else None for n in tensor.shape]),
            tensor.dtype,
        )
        light.graph.inputs.append(value)
    try:
        onnx.checker.check_model(to_proto(light), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InternalError(f"the graph is not valid ONNX: {error}") from error
