"""Every pass by its name: an explicit table, so that nothing registers by being imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eptc.pass_base import AdapterPass, GraphPass

__all__ = ["PASSES", "find_pass", "passes_table"]

# In the order of the default pipeline.
PASSES: dict[str, str] = {
    "specialize-router": "eptc.passes.specialize_router:SpecializeRouter",
    "freeze-router": "eptc.passes.freeze_router:FreezeRouter",
    "drop-dead-experts": "eptc.passes.drop_dead_experts:DropDeadExperts",
    "factor-pyramid": "eptc.passes.factor_pyramid:FactorPyramid",
    "stack-tasks": "eptc.passes.stack_tasks:StackTasks",
    "truncate-rank": "eptc.passes.truncate_rank:TruncateRank",
    "fold-pyramid": "eptc.passes.fold_pyramid:FoldPyramid",
    "fold-transposes": "eptc.passes.fold_transposes:FoldTransposes",
    "gather-early": "eptc.passes.gather_early:GatherEarly",
    "split-equal": "eptc.passes.split_equal:SplitEqual",
    "pack-projections": "eptc.passes.pack_projections:PackProjections",
    "fuse-rotary": "eptc.passes.fuse_rotary:FuseRotary",
    "fuse-attention": "eptc.passes.fuse_attention:FuseAttention",
    "narrow-weights": "eptc.passes.narrow_weights:NarrowWeights",
    "clip-integers": "eptc.passes.clip_integers:ClipIntegers",
    "count-in-float": "eptc.passes.count_in_float:CountInFloat",
    "quantize-weights": "eptc.passes.quantize_weights:QuantizeWeights",
    "quantize-int8-dynamic": "eptc.passes.quantize_int8_dynamic:QuantizeInt8Dynamic",
    "quantize-int8-static": "eptc.passes.quantize_int8_static:QuantizeInt8Static",
    "quantize-qdq": "eptc.passes.quantize_qdq:QuantizeQdq",
    "cast-half": "eptc.passes.cast_half:CastHalf",
    "stable-names": "eptc.passes.stable_names:StableNames",
}


def find_pass(name: str) -> type[AdapterPass] | type[GraphPass]:
    """Return the class of a pass; a KeyError where there is none of that name."""
    module, _, attribute = PASSES[name].partition(":")
    home = importlib.import_module(module)
    found: type[AdapterPass] | type[GraphPass] = getattr(home, attribute)
    return found


def passes_table() -> str:
    """Return the README's table of passes, made from the passes themselves."""
    from eptc.pass_base import AdapterPass

    lines = ["| pass | on | contract | what it does |", "|---|---|---|---|"]
    for name in PASSES:
        found = find_pass(name)
        stage = "adapters" if issubclass(found, AdapterPass) else "graph"
        summary = (found.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{name}` | {stage} | {found.contract} | {summary} |")
    return "\n".join(lines) + "\n"
