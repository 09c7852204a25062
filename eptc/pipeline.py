"""The passes eptc runs, in order, and the reason of each position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eptc.lower.blocks import PRECISIONS, Method
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
from eptc.run_passes import Step

__all__ = [
    "Ranges",
    "adapter_passes",
    "factoring_passes",
    "freezing_passes",
    "graph_passes",
    "lossy_passes",
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
