"""Whether a pass over the adapter IR keeps what it promises about the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from eptc.errors import ParityError
from eptc.ir import AdaptedModel, Adapter
from eptc.linear_probe import LinearProbe
from eptc.pass_base import AdapterPass
from eptc.tensors import unit_roundoff

__all__ = ["measure"]

# Outputs below this are none.
_TINY = float(np.finfo(np.float64).tiny)


def measure(
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
