"""From exact graphs to lower precision: which passes, what they need to know, what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from eptc.architectures import Architecture
from eptc.calibration import Range, cut_rows, float_values, observe, weight_ranges
from eptc.errors import InternalError
from eptc.lower.explicit_quantization import check_explicit
from eptc.lower.half import limit
from eptc.lower.quantizable import quantized_inputs
from eptc.lower.weights import STACKED, WeightTensor
from eptc.options import Options
from eptc.parity_gate import Budget, Example
from eptc.pass_base import LossyPass, QuantizingPass
from eptc.pipeline import Ranges, lossy_passes
from eptc.precision import SCHEMES
from eptc.precision_plan import LEVELS, PrecisionPlan, stored_weights
from eptc.run_passes import PassRecord, Step, run_graph_passes
from eptc.runtime import Engine
from eptc.search import search
from eptc.tasks import Task
from eptc.trials import levels

__all__ = ["Lowered", "budget_of", "lower_precision"]

Progress = Callable[[Any], None]
Graphs = Mapping[str, onnx_ir.Model]

_PLANNED = "the plan stores it as float32"
_HEAD = "the head that decides is small, and each error in it is an error of the answer"

_BRANCH = "routers and experts are small, and an error in a route chooses other experts"


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What lowering the precision of some graphs came to.

    Args:
        records: what the passes did.
        report: the content of the bundle's `precision.json`.
        notes: what a user should know.
    """

    records: Sequence[PassRecord]
    report: Mapping[str, Any]
    notes: tuple[str, ...]


def budget_of(options: Options, task: Task) -> Budget:
    """Return what an engine may cost on labelled data of a task.

    Where nothing is said, one label in a hundred may change where the reference is sure, and a
    metric of values, which cannot flip, may lose a point.
    """
    if options.max_drop is not None or options.max_flips is not None:
        return Budget(options.max_drop, options.max_flips)
    return Budget(max_drop=1.0, max_flips=None) if task.kind == "regression" else Budget()


def lower_precision(
    graphs: Graphs,
    options: Options,
    architecture: Architecture,
    exact: Path | None,
    *,
    plan: PrecisionPlan | None,
    texts: Sequence[Example],
    data: Sequence[Example] | None,
    progress: Progress,
) -> Lowered:
    """Lower the precision of exact graphs, in place.

    Args:
        graphs: the graphs after every exact pass, their weights bound.
        options: what the build was asked for.
        architecture: the model's.
        exact: the bundle of the same graphs in float32; None where none was written.
        plan: what each weight is to be stored as; None: searched where it is needed.
        texts: what the ranges of activations are seen on.
        data: labelled texts that a plan is searched on.
        progress: called with what is being done.

    Raises:
        InputError: a plan or a text that cannot be used.
        ParityError: no plan keeps the budget.
    """
    kept = dict.fromkeys(_heads(graphs, architecture), _HEAD)
    kept |= dict.fromkeys(_branches(graphs), _BRANCH)
    ranges = None
    report: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()
    if options.precision == "auto":
        plan, report = _planned(graphs, options, exact, plan, kept, data, progress)
    elif SCHEMES[options.precision].calibrated:
        ranges, notes = _observed(graphs, options, exact, kept, texts, progress)
    steps = lossy_passes(
        options.precision, options.provider, keep=tuple(kept), ranges=ranges, plan=plan,
        method=options.block_method,
    )  # fmt: skip
    kept = dict(sorted({**_left(graphs, steps, plan), **kept}.items()))
    records = run_graph_passes(graphs, steps)
    if options.explicit_quantization:
        for model in graphs.values():
            check_explicit(model.graph)
    stored = PrecisionPlan(stored_weights(graphs))
    if options.precision != "auto" and set(stored.weights.values()) == {LEVELS[0]}:
        notes = (*notes, f"no weight could be stored in {options.precision}: all are float32")
    return Lowered(records, {**stored.to_json(), "stays_float32": kept, **report}, notes)


def _left(graphs: Graphs, steps: Sequence[Step], plan: PrecisionPlan | None) -> dict[str, str]:
    """Return why what stays in float32 does: no pass takes it, or the plan wants it so."""
    found = {} if plan is None else dict.fromkeys(plan.of(LEVELS[0]), _PLANNED)
    for name, model in graphs.items():
        passes = [step[name] if isinstance(step, Mapping) else step for step in steps]
        reasons = [
            (dataclasses.replace(each, only=None) if isinstance(each, QuantizingPass) else each)
            .plan(model)
            for each in passes
            if isinstance(each, LossyPass)
        ]  # fmt: skip
        found |= {n: why for n, why in reasons[-1].items() if all(n in r for r in reasons)}
    return found


def _heads(graphs: Graphs, architecture: Architecture) -> list[str]:
    """Return the matrices of a classifier's head: those outside of the bare model."""
    if architecture.kind != "encoder-classifier":
        return []
    names = {name for graph in graphs.values() for name in stored_weights({"": graph})}
    return sorted(name for name in names if not name.startswith(f"{architecture.prefix}."))


def _branches(graphs: Graphs) -> list[str]:
    """Return the weights of routers and experts beside linears, and what tasks have there."""
    names = {name for graph in graphs.values() for name in graph.graph.initializers}
    return sorted(name for name in names if ".branch." in name or STACKED in name)


def _planned(
    graphs: Graphs,
    options: Options,
    exact: Path | None,
    plan: PrecisionPlan | None,
    kept: Mapping[str, str],
    data: Sequence[Example] | None,
    progress: Progress,
) -> tuple[PrecisionPlan, Mapping[str, Any]]:
    """Return the plan that was given, if it fits the graphs, or search for one."""

    def passes(plan: PrecisionPlan) -> list[Step]:
        return lossy_passes(
            "auto", options.provider, keep=tuple(kept), plan=plan, method=options.block_method
        )

    if plan is not None:
        known = dict.fromkeys(stored_weights(graphs), LEVELS[:1])
        plan.check_names({**known, **levels(graphs, passes)})
        return plan, {}
    if exact is None or data is None:
        raise InternalError("a plan is searched without an exact engine or without data")
    found = search(
        graphs, exact, passes, data, Budget(options.max_drop, options.max_flips),
        evaluations=options.search_evaluations, minutes=options.search_minutes, progress=progress,
    )  # fmt: skip
    return found.plan, {"search": found.record}


def _observed(
    graphs: Graphs,
    options: Options,
    exact: Path | None,
    kept: Mapping[str, str],
    texts: Sequence[Example],
    progress: Progress,
) -> tuple[Ranges, tuple[str, ...]]:
    """Run the exact engine on text; return how far its values reach, and what to know of it.

    16 bits overflow whatever a value is used for, so that all are observed, by their extremes, and
    weights that overflow are among them; 8 bits need the ranges of what is multiplied alone.
    """
    if exact is None:
        raise InternalError("ranges are observed without an exact engine")
    quantized = SCHEMES[options.precision].quantized
    values = {
        name: quantized_inputs(model.graph, keep=tuple(kept)) if quantized else float_values(model)
        for name, model in graphs.items()
    }
    method = options.calibration_method if quantized else "minmax"
    progress(f"ranges of {sum(map(len, values.values()))} values on {len(texts)} texts")
    found = observe(exact, texts, values, method=method)
    if not quantized:
        found = {name: {**found[name], **each} for name, each in _large(graphs, options, exact)}
    with Engine.load(exact, providers=["cpu"]) as engine:
        cut = cut_rows(engine, texts)
    notes = f"{cut} of {len(texts)} texts were longer than training's and cut for calibration"
    return {
        name: {value: (range_.low, range_.high) for value, range_ in found[name].items()}
        for name in graphs
    }, (notes,) if cut else ()


def _large(
    graphs: Graphs, options: Options, exact: Path
) -> Iterator[tuple[str, Mapping[str, Range]]]:
    """Yield, by graph, the ranges of the weights that 16 bits cannot hold."""
    most = limit("float16" if options.precision == "fp16" else "bfloat16")
    names = {
        name: [
            n
            for n, v in model.graph.initializers.items()
            if isinstance(v.const_value, WeightTensor)
        ]
        for name, model in graphs.items()
    }
    for name, ranges in weight_ranges(exact, names).items():
        yield name, {n: range_ for n, range_ in ranges.items() if range_.magnitude > most}
