"""From exact graphs to lower precision: which passes, what they need to know, what they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from eptc.architectures import Architecture
from eptc.calibration import (
    Range,
    cut_rows,
    float_values,
    least_magnitudes,
    observe,
    weight_ranges,
)
from eptc.errors import InternalError
from eptc.lower import float8, int8
from eptc.lower.explicit_quantization import check_explicit
from eptc.lower.quantizable import quantizable, quantized_inputs
from eptc.lower.weights import STACKED, WeightTensor
from eptc.options import CalibrationMethod, Options
from eptc.parity_gate import Budget, Example
from eptc.pass_base import LossyPass, QuantizingPass
from eptc.pipeline import Ranges, lossy_passes
from eptc.precision import SCHEMES, Scheme
from eptc.precision_plan import LEVELS, PrecisionPlan, stored_weights
from eptc.run_passes import PassRecord, Step, run_graph_passes
from eptc.runtime import Engine
from eptc.search import search
from eptc.tasks import Task
from eptc.tensors import limit, smallest
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
    seen = _Seen()
    report: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()
    if options.precision == "auto":
        plan, report = _planned(graphs, options, exact, plan, kept, data, progress)
    elif SCHEMES[options.precision].calibrated:
        seen, notes = _observed(graphs, options, exact, kept, texts, progress)
    steps = lossy_passes(
        options.precision, options.provider, keep=tuple(kept), ranges=seen.ranges,
        extremes=seen.extremes, small=seen.small, plan=plan, method=options.block_method,
    )  # fmt: skip
    records = []
    if options.explicit_quantization and SCHEMES[options.precision].half is not None:
        # What 16 bits take depends on what 8 bits left, and that is in 16 bits for a reason.
        left = _left(graphs, steps[:1], plan)
        records += run_graph_passes(graphs, steps[:1])
        steps = steps[1:]
        report = {"not_quantized": dict(sorted({**left, **kept}.items()))}
    kept = dict(sorted({**_left(graphs, steps, plan), **kept}.items()))
    records += run_graph_passes(graphs, steps)
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


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What an exact engine showed of itself; each as for `lossy_passes`."""

    ranges: Ranges | None = None
    extremes: Ranges | None = None
    small: tuple[str, ...] = ()


def _observed(
    graphs: Graphs,
    options: Options,
    exact: Path | None,
    kept: Mapping[str, str],
    texts: Sequence[Example],
    progress: Progress,
) -> tuple[_Seen, tuple[str, ...]]:
    """Run the exact engine on text; return how far its values reach, and what to know of it.

    16 bits overflow whatever a value is used for, so that all are observed, by their extremes, and
    weights that overflow are among them; 8 bits need the ranges of what is multiplied alone.
    """
    if exact is None:
        raise InternalError("ranges are observed without an exact engine")
    scheme, keep = SCHEMES[options.precision], tuple(kept)

    def seen(values: Mapping[str, Sequence[str]], method: CalibrationMethod) -> Mapping[str, Any]:
        progress(f"ranges of {sum(map(len, values.values()))} values on {len(texts)} texts")
        return observe(exact, texts, values, method=method)

    ranges = extremes = None
    small: tuple[str, ...] = ()
    if scheme.number is not None:
        values = {k: quantized_inputs(m.graph, keep=keep) for k, m in graphs.items()}
        ranges = _ends(seen(values, options.calibration_method))
    if scheme.half is not None:
        found = seen({k: float_values(m) for k, m in graphs.items()}, "minmax")
        large = _large(graphs, scheme.half, exact)
        extremes = _ends({name: {**found[name], **each} for name, each in large})
        if scheme.number is not None:
            small = tuple(_small(graphs, scheme, keep, exact))
    with Engine.load(exact, providers=["cpu"]) as engine:
        cut = cut_rows(engine, texts)
    notes = f"{cut} of {len(texts)} texts were longer than training's and cut for calibration"
    return _Seen(ranges, extremes, small), (notes,) if cut else ()


def _ends(found: Mapping[str, Mapping[str, Range]]) -> Ranges:
    return {
        graph: {value: (range_.low, range_.high) for value, range_ in each.items()}
        for graph, each in found.items()
    }


def _small(graphs: Graphs, scheme: Scheme, keep: tuple[str, ...], exact: Path) -> Iterator[str]:
    """Yield the weights with scales for which 16 bits have fewer digits."""
    assert scheme.half is not None
    axes = {
        name: {
            str(site.weight.name): site.axis if scheme.number == "int8" else None
            for site in quantizable(model.graph, keep=keep)
        }
        for name, model in graphs.items()
    }
    largest = int8.FULL if scheme.number == "int8" else float8.LARGEST
    least = smallest(scheme.half) * largest
    for found in least_magnitudes(exact, axes).values():
        yield from (name for name, magnitude in found.items() if magnitude < least)


def _large(graphs: Graphs, half: str, exact: Path) -> Iterator[tuple[str, Mapping[str, Range]]]:
    """Yield, by graph, the ranges of the weights that 16 bits cannot hold."""
    most = limit(half)
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
