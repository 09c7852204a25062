"""What a traced graph loses before weights are bound: shape arithmetic, noise, duplicates."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import rewriter
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import pattern

from eptc.lower.reshapes import constant_reshapes

__all__ = ["simplify"]


def simplify(model: ir.Model) -> None:
    """Simplify an unbound graph in place; its interface and its initializers' names stay.

    The weights have no data yet, so no pass can read, fold or copy one.
    """
    ir.passes.Sequential(
        common.InlinePass(),
        common.IdentityEliminationPass(),
        # Small constants only: a folded result is written into every graph that uses it.
        FoldConstantsPass(shape_inference=True, input_size_limit=1024, output_size_limit=1024),
        rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES),
        rewriter.RewritePass(_RULES),
        common.RemoveUnusedNodesPass(),
    )(model)
    constant_reshapes(model.graph)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        FoldConstantsPass(shape_inference=True, input_size_limit=1024, output_size_limit=1024),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    )(model)


def _normalise(op, x, variance):  # type: ignore[no-untyped-def]  # the matcher's own protocol
    return op.Mul(x, op.Reciprocal(op.Sqrt(variance)))


def _divide(op, x, variance):  # type: ignore[no-untyped-def]  # the matcher's own protocol
    return op.Div(x, op.Sqrt(variance))


# One rounding less than x * (1 / sqrt(v)), and the form runtimes recognise as RMS norm.
_RULES = [pattern.RewriteRule(_normalise, _divide)]
