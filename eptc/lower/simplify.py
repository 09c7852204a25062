"""What a traced graph loses before weights are bound: shape arithmetic, noise, duplicates."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import pattern

from eptc.lower.reshapes import constant_reshapes
from eptc.lower.sizes import read_sizes_from_first_inputs

__all__ = ["simplify"]

# Elements. Shape arithmetic is smaller by far; what is larger is no noise.
_FOLDED = 1024


def simplify(model: ir.Model) -> None:
    """Simplify an unbound graph in place; its interface and its weights' names stay.

    The weights have no data yet, so no pass can read, fold or copy one.
    """
    _optimize(model)
    rewriter.rewrite(model, pattern_rewrite_rules=_RULES)
    constant_reshapes(model.graph)
    read_sizes_from_first_inputs(model.graph)
    _optimize(model)
    common.TopologicalSortPass()(model)


def _optimize(model: ir.Model) -> None:
    """Fold, inline, merge and remove with the optimizer of onnxscript."""
    common.IdentityEliminationPass()(model)
    optimizer.optimize_ir(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)


def _normalise(op, x, variance):  # type: ignore[no-untyped-def]  # the matcher's own protocol
    return op.Mul(x, op.Reciprocal(op.Sqrt(variance)))


def _divide(op, x, variance):  # type: ignore[no-untyped-def]  # the matcher's own protocol
    return op.Div(x, op.Sqrt(variance))


# One rounding less than x * (1 / sqrt(v)), and the form runtimes recognise as RMS norm.
_RULES = [pattern.RewriteRule(_normalise, _divide)]
