"""Run passes one after another: validate after each, check its contract, record what it did."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnx
import onnx_ir

from eptc.errors import EptcError, InternalError, ParityError, PluginError
from eptc.ir import AdaptedModel, Adapter
from eptc.linear_probe import LinearProbe
from eptc.lower.blocks import PRECISIONS, Method
from eptc.lower.strong_types import check_types
from eptc.node_makers import sign
from eptc.pass_base import AdapterPass, GraphPass, QuantizingPass
from eptc.passes.cast_half import CastHalf
from eptc.passes.drop_dead_experts import DropDeadExperts
from eptc.passes.factor_pyramid import FactorPyramid
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.passes.fold_transposes import FoldTransposes
from eptc.passes.freeze_router import FreezeRouter
from eptc.passes.fuse_attention import FuseAttention
from eptc.passes.fuse_rotary import FuseRotary
from eptc.passes.gather_early import GatherEarly
from eptc.passes.narrow_weights import NarrowWeights
from eptc.passes.pack_projections import PackProjections
from eptc.passes.quantize_int8_dynamic import QuantizeInt8Dynamic
from eptc.passes.quantize_int8_static import QuantizeInt8Static
from eptc.passes.quantize_qdq import QuantizeQdq
from eptc.passes.quantize_weights import QuantizeWeights
from eptc.passes.specialize_router import SpecializeRouter
from eptc.passes.split_equal import SplitEqual
from eptc.passes.stable_names import StableNames
from eptc.passes.stack_tasks import StackTasks
from eptc.passes.truncate_rank import TruncateRank
from eptc.precision import SCHEMES, OptimizeFor, Precision, Scheme
from eptc.precision_plan import PrecisionPlan
from eptc.tensors import unit_roundoff

__all__ = [
    "PassRecord",
    "Ranges",
    "Step",
    "adapter_passes",
    "factoring_passes",
    "freezing_passes",
    "graph_passes",
    "lossy_passes",
    "run_adapter_passes",
    "run_graph_passes",
    "stacking_passes",
]


def adapter_passes(
    task_id: int, dtype: str | None = "float32", added: Sequence[AdapterPass] = ()
) -> list[AdapterPass]:
    """Return the passes over the adapter IR, in order.

    Args:
        task_id: the task to compile.
        dtype: type of the folded weights; None: each base weight's own.
        added: exact passes beside eptc's own.
    """
    return [
        SpecializeRouter(task_id),  # first: nothing can be folded while a gate reads the task
        DropDeadExperts(),  # before folding: N - top_k of N experts are never computed
        *added,  # before folding: afterwards there is nothing to rewrite
        FoldPyramid(dtype),  # last: afterwards the model is a plain Hugging Face model
    ]


def factoring_passes(task_id: int, max_rank: int | None = None) -> list[AdapterPass]:
    """Return the passes that leave one plain low rank beside each linear, in order.

    Args:
        task_id: the task.
        max_rank: ranks above it are cut, which is lossy; None: all are kept.
    """
    return [
        SpecializeRouter(task_id),  # first: nothing can be summed while a gate reads the task
        DropDeadExperts(),  # before factoring: experts with no weight would be read for nothing
        FactorPyramid(),
        # Behind it: what is cut is the sum of the experts, not one of them.
        *([] if max_rank is None else [TruncateRank(max_rank)]),
    ]


def stacking_passes(
    task_ids: Sequence[int], added: Sequence[AdapterPass] = ()
) -> list[AdapterPass]:
    """Return the passes that leave a low rank for each of several tasks beside each linear.

    Args:
        task_ids: the tasks.
        added: exact passes beside eptc's own.
    """
    return [
        *added,  # before stacking: afterwards there are plain low ranks only
        StackTasks(tuple(task_ids)),
    ]


def freezing_passes(
    gates: Mapping[str, Sequence[float]],
    spread: Mapping[str, Sequence[float]],
    dtype: str | None = "float32",
) -> list[AdapterPass]:
    """Return the passes that fold what `adapter_passes` left, lossy, in order.

    Args:
        gates: mean gates by linear (`FreezeRouter`).
        spread: their standard deviations.
        dtype: type of the folded weights; None: each base weight's own.
    """
    return [
        FreezeRouter(gates, spread),
        DropDeadExperts(),  # experts that no token chose
        FoldPyramid(dtype),
    ]


def graph_passes(
    optimize_for: OptimizeFor = "cpu",
    precision: Precision = "fp32",
    added: Sequence[GraphPass] = (),
) -> list[GraphPass]:
    """Return the exact passes over each ONNX graph, in order.

    Args:
        optimize_for: the execution provider whose kernels the graphs are fused for; `any`:
            standard operators only, which every runtime has.
        precision: with `keep`, weights are stored in the 16-bit type they came in.
        added: exact passes beside eptc's own.
    """
    fusions: dict[OptimizeFor, list[GraphPass]] = {
        "any": [],
        "cpu": [
            FuseRotary(),  # before attention: queries and keys are split after it, not before
            # Batches of tokens spend their time in MatMul; a token at a time, in launching.
            FuseAttention(only_cached=True),
        ],
        "cuda": [
            SplitEqual(),  # anywhere: nothing else knows comparisons
            PackProjections(),  # after transposes are folded: it joins columns
            FuseRotary(),  # as above
            FuseAttention(),
        ],
    }
    return [
        FoldTransposes(),  # weights are bound by now: a transpose is a matter of how one is read
        GatherEarly(),  # before fusions: it knows the standard operators
        *fusions[optimize_for],
        # Behind fusions, which know float32 weights: a Cast would stand in their way.
        *([NarrowWeights()] if precision == "keep" else []),
        *added,  # behind all that looks for patterns, which they may change
        StableNames(),  # last: nothing after it may add a node or a name
    ]


# A pass for all graphs of an engine, or one for each.
Step = GraphPass | Mapping[str, GraphPass]
Ranges = Mapping[str, Mapping[str, tuple[float, float]]]


def lossy_passes(
    precision: Precision,
    optimize_for: OptimizeFor,
    *,
    keep: tuple[str, ...] = (),
    ranges: Ranges | None = None,
    extremes: Ranges | None = None,
    small: tuple[str, ...] = (),
    plan: PrecisionPlan | None = None,
    method: Method = "rtn",
) -> list[Step]:
    """Return the passes that lower the precision of exact graphs, in order.

    Args:
        precision: what to.
        optimize_for: where the engine will run.
        keep: weights that stay float32.
        ranges: by graph, from where to where each value that is quantised goes, where the
            precision fixes that.
        extremes: by graph, least and largest number of each value and of large weights, where
            the precision has 16 bits.
        small: weights with scales that are too small for 16 bits (`CastHalf.small`).
        plan: for `auto`, what each weight is stored as.
        method: how the scales of blocks are chosen.
    """
    steps: list[Step]
    scheme = SCHEMES[precision]
    if scheme.number is not None or scheme.half is not None:
        steps = []
        if scheme.number is not None:
            assert ranges is not None
            steps += [{key: _fixed(scheme, optimize_for, keep, r) for key, r in ranges.items()}]
        if scheme.half is not None:  # behind what has weights in float64 to round
            assert extremes is not None
            steps += [{key: _half(scheme, keep, small, r) for key, r in extremes.items()}]
    elif plan is not None:
        steps = [
            _blocks("int4", method, keep, plan.of("int4")),
            QuantizeInt8Dynamic(only=plan.of("int8"), keep=keep),
        ]
    elif precision == "int8":
        steps = [QuantizeInt8Dynamic(keep=keep)]
    else:
        steps = [_blocks(precision, method, keep, None)]
    # New nodes and initializers get names of their own, and their place.
    return [*steps, StableNames()]


def _fixed(
    scheme: Scheme,
    optimize_for: OptimizeFor,
    keep: tuple[str, ...],
    ranges: Mapping[str, tuple[float, float]],
) -> QuantizingPass:
    """Return the pass that quantises activations by ranges that were observed."""
    assert scheme.number is not None
    if optimize_for == "cpu":
        return QuantizeInt8Static(ranges, keep=keep)
    return QuantizeQdq(ranges, scheme.number, scheme.half or "float32", keep=keep)


def _half(
    scheme: Scheme,
    keep: tuple[str, ...],
    small: tuple[str, ...],
    extremes: Mapping[str, tuple[float, float]],
) -> CastHalf:
    assert scheme.half is not None
    ranges = {name: max(abs(low), abs(high)) for name, (low, high) in extremes.items()}
    return CastHalf(scheme.half, ranges, keep=keep, small=small)


def _blocks(
    precision: Precision, method: Method, keep: tuple[str, ...], only: tuple[str, ...] | None
) -> QuantizeWeights:
    blocks = PRECISIONS[precision]
    return QuantizeWeights(blocks.bits, blocks.size, method, keep=keep, only=only)


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


# Constants up to this many bytes stay in a graph that is checked: shape inference reads them.
_SMALL = 1024

# Outputs below this are none.
_TINY = float(np.finfo(np.float64).tiny)

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
                label, origin, _measure, step, label, model, rewritten, task_ids, probe
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


def _measure(
    step: AdapterPass,
    label: str,
    before: AdaptedModel,
    after: AdaptedModel,
    task_ids: Sequence[int],
    probe: LinearProbe,
) -> tuple[float, float]:
    """Return the largest deviation over all linears as a fraction of its bound, and that bound.

    The bound is given as a fraction of the largest output of its linear: the largest of all.

    The bound of an `exact` pass: a weight it computed anew was rounded once to its type, so each
    of its products may move by half a unit in its last place (2**-24 of itself in float32);
    everything else is float64 and may move by 2**-40 of the terms that are summed.
    """
    if after is before:
        return 0.0, 0.0
    worst = widest = 0.0
    for path, task_id in itertools.product(sorted(before.adapters), task_ids):
        parameter = before.adapters[path].parameter
        old, new = (probe.output(model, path, task_id) for model in (before, after))
        rounded = after.weights[parameter] is not before.weights[parameter]
        moved = np.abs(new.total - old.total)
        roundoff = unit_roundoff(after.weights[parameter].dtype) if rounded else 0.0
        bound = 2.0**-40 * (old.scale + new.scale + old.branch_scale) + roundoff * new.scale
        # Two factors, each rounded once.
        bound += (
            2 * _factors_rounded(before.adapters[path], after.adapters[path]) * new.branch_scale
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = moved / bound
        error = float(np.nan_to_num(np.max(ratio), nan=np.inf))
        if step.contract == "exact" and not error <= 1.0:
            raise ParityError(
                f"the pass {label} is exact, but moved the output of {path} by "
                f"{moved.max():.3g}, {error:.3g} times what rounding can do",
                fix="this is a bug in the pass: report it with the checkpoint's shapes",
            )
        worst = max(worst, error)
        widest = max(widest, float(bound.max()) / max(float(np.abs(old.total).max()), _TINY))
    return worst, widest


def _factors_rounded(before: Adapter, after: Adapter) -> float:
    """Return the unit roundoff of factors that a pass computed anew; 0 where it did not."""
    known = {id(tensor) for branch in before.branches for tensor in branch.delta.tensors}
    new = [t for b in after.branches for t in b.delta.tensors if id(t) not in known]
    return max((unit_roundoff(tensor.dtype) for tensor in new), default=0.0)


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
        onnx.checker.check_model(onnx_ir.to_proto(light), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InternalError(f"the graph is not valid ONNX: {error}") from error
