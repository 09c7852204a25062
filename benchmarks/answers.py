"""Whether contestants compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases import Case

__all__ = ["difference"]

# Further off than this, as a fraction of the largest element, is no matter of rounding.
_FAR = 0.01


def difference(
    answer: Any, right: Any, case: Case, *, same_weights: bool
) -> tuple[float | None, str | None]:
    """Compare an answer with the right one.

    Args:
        answer: logits, hidden states or token ids.
        right: the reference's; None where it could not run.
        case: what was run.
        same_weights: whether the two should agree; the base model has answers of its own.

    Returns:
        How far it is off: the largest absolute difference, or the share of tokens that differ;
        None where nothing was compared. And what is wrong with it, or None.
    """
    if case.mode == "generate" and answer.shape != (case.batch, case.new_tokens):
        return None, f"it wrote tokens of shape {answer.shape}, not {case.new_tokens} a row"
    if right is None or not same_weights:
        return None, None
    if answer.shape != right.shape:
        return None, f"it has the shape {answer.shape}, not {right.shape}"
    if case.mode == "generate":
        # Where two tokens are as likely as each other rounding may choose, and all later ones
        # differ; the work is the same.
        return float(np.mean(answer != right)), None
    off = float(np.abs(answer - right).max())
    if not off <= _FAR * float(np.abs(right).max()):
        return off, f"it is off by {off:.3g} (of {float(np.abs(right).max()):.3g})"
    return off, None
