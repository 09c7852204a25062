"""The layer gate: every adapted linear of the IR against the reference's own module."""

from __future__ import annotations

import numpy as np
import torch

from eptc.errors import ParityError
from eptc.ir import AdaptedModel
from eptc.nn import EptModel
from eptc.pipeline import layer_output, probe_rows

__all__ = ["check_layers"]


def check_layers(model: AdaptedModel, reference: EptModel, task_id: int, stage: str) -> float:
    """Compare what every adapted linear adds up to, on seeded rows.

    The branches may differ by 1e-5 of their largest output (the reference sums in float32). A
    weight that was folded was rounded to float32 once, which may move each product by 2**-24 of
    itself.

    Args:
        model: the IR after `stage`.
        reference: the unfolded PyTorch model.
        task_id: the task.
        stage: the reader or pass that made `model`, for the message.

    Returns:
        The largest deviation as a fraction of its bound.

    Raises:
        ParityError: a linear is off, missing, or adapted on one side only.
    """
    if set(model.adapters) != set(reference.layers):
        odd = sorted(set(model.adapters) ^ set(reference.layers))
        raise ParityError(
            f"after {stage}, {odd[0]} is adapted on one side only",
            expected=f"the same {len(reference.layers)} linears as the reference adapts",
        )
    worst = 0.0
    for index, (path, layer) in enumerate(sorted(reference.layers.items())):
        x = probe_rows(index, layer.in_features).astype(np.float32)
        with torch.no_grad():
            branch = layer.delta(torch.from_numpy(x), task_id).numpy().astype(np.float64)
        weight = layer.weight.detach().numpy().astype(np.float64)
        wide = x.astype(np.float64)
        want = wide @ weight.T + branch
        got, branches, scale = layer_output(model, path, wide, task_id)
        bound = 1e-5 * np.abs(branch).max() + 2.0**-40 * scale
        if not branches.any():
            bound = bound + 2.0**-24 * scale
        ratio = np.abs(got - want) / np.maximum(bound, np.finfo(np.float64).tiny)
        error = float(np.nan_to_num(ratio, nan=np.inf).max())
        if not error <= 1.0:
            row, column = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            raise ParityError(
                f"after {stage}, the linear {path} differs from the reference: output {column} of "
                f"probe {row} is {got[row, column]:.7g}, the reference has "
                f"{want[row, column]:.7g}, {error:.3g} times the bound",
                expected=f"a difference of at most {bound[row, column]:.3g}",
                fix="if top-k, the task list and the base are right, this is a bug in eptc: "
                "report it with `eptc inspect --json` of the checkpoint",
            )
        worst = max(worst, error)
    return worst
