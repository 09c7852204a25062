"""The layer gate: every adapted linear of the IR against the reference's own module."""

from __future__ import annotations

import numpy as np
import torch

from eptc.errors import ParityError
from eptc.ir import AdaptedModel, Float64
from eptc.linear_probe import LinearOutput, LinearProbe
from eptc.nn import EptLinear, EptModel

__all__ = ["LayerGate"]


class LayerGate:
    """Compares what every adapted linear adds up to, on seeded rows, after any stage.

    The branches may differ by 1e-5 of their largest output (the reference sums in float32). A
    weight that was folded was rounded to float32 once, which may move each product by 2**-24 of
    itself.

    Args:
        reference: the unfolded PyTorch model.
        task_id: the task, by the reference's own list.
    """

    def __init__(self, reference: EptModel, task_id: int) -> None:
        self.probe = LinearProbe()
        self.task_id = task_id
        self._wanted = {
            path: self._reference_output(path, layer)
            for path, layer in sorted(reference.layers.items())
        }

    def check(self, model: AdaptedModel, stage: str) -> float:
        """Return the largest deviation of a linear as a fraction of its bound.

        Args:
            model: the IR after `stage`.
            stage: the reader or pass that made `model`, for the message.

        Raises:
            ParityError: a linear is off, or adapted on one side only.
        """
        if set(model.adapters) != set(self._wanted):
            odd = sorted(set(model.adapters) ^ set(self._wanted))
            raise ParityError(
                f"after {stage}, {odd[0]} is adapted on one side only",
                expected=f"the same {len(self._wanted)} linears as the reference adapts",
            )
        return max(
            self._check_linear(path, self.probe.output(model, path, self.task_id), stage)
            for path in self._wanted
        )

    def _reference_output(self, path: str, layer: EptLinear) -> tuple[Float64, float]:
        """Return the reference's output [rows, out], and the largest of its branches alone."""
        rows = torch.from_numpy(self.probe.rows(path, layer.in_features))
        with torch.no_grad():
            branch = layer.delta(rows.float(), self.task_id).double()
            total = rows @ layer.weight.double().T + branch
        return total.numpy(), float(branch.abs().max())

    def _check_linear(self, path: str, output: LinearOutput, stage: str) -> float:
        (want, largest), got = self._wanted[path], output.total
        bound = 1e-5 * largest + 2.0**-40 * output.scale
        if not output.branches.any():
            bound = bound + 2.0**-24 * output.scale
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
        return error
