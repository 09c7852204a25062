"""The layer gate: every adapted linear of the IR against the reference's own module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from eptc.errors import CheckpointError, ParityError
from eptc.ir import AdaptedModel, Float64
from eptc.linear_probe import LinearOutput, LinearProbe
from eptc.nn.adapted import ReferenceModel
from eptc.tensors import unit_roundoff

__all__ = ["LayerGate", "LayerOutputs", "layer_outputs"]

# Elements of a weight that are float64 at once.
_ELEMENTS = 2**18


@dataclasses.dataclass(frozen=True)
class LayerOutputs:
    """What the reference's adapted linears give on the rows of a `LinearProbe`.

    Args:
        task_id: the task, by the reference's own list.
        wanted: of each linear by its path, the output [rows, out], and the largest magnitude
            of what its branches alone add.
        others: those of further tasks.
    """

    task_id: int
    wanted: Mapping[str, tuple[Float64, float]]
    others: tuple[LayerOutputs, ...] = ()


def layer_outputs(
    reference: ReferenceModel,
    task_id: int,
    loaded: Callable[[torch.nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> LayerOutputs:
    """Run every adapted linear of the reference.

    Args:
        reference: the unfolded model.
        task_id: the task.
        loaded: has a module's parameters in memory for a while.

    Raises:
        CheckpointError: the experts of a linear overflow float32, in which the reference runs.
    """
    probe = LinearProbe()
    wanted = {}
    for path, layer in sorted(reference.layers.items()):
        rows = torch.from_numpy(probe.rows(path, layer.in_features))
        with torch.no_grad(), loaded(layer):
            if layer.routed_experts:
                gates = torch.tensor(probe.gates(path, layer.routed_experts))
                branch = layer.mixed(rows.float(), gates).double()
            else:
                branch = layer.delta(rows.float(), task_id).double()
            parts = torch.split(layer.weight, max(1, _ELEMENTS // layer.in_features))
            total = torch.cat([rows @ part.double().T for part in parts], dim=1) + branch
        if not total.isfinite().all():
            raise CheckpointError(
                f"what the experts of {path} add overflows float32",
                fix="the checkpoint's kernels or alpha are beyond what it can have trained with",
            )
        wanted[path] = total.numpy(), float(branch.abs().max())
    return LayerOutputs(task_id, wanted)


class LayerGate:
    """Compares what every adapted linear adds up to, on seeded rows, after any stage.

    The branches may differ by 1e-5 of their largest output (the reference sums in float32). A
    weight that was folded was rounded once, to float32 or to the 16-bit type it is stored in,
    which may move each product by half a unit of its last place.

    Args:
        reference: what its linears give.
    """

    def __init__(self, reference: LayerOutputs) -> None:
        self.probe = LinearProbe()
        self._references = (reference, *reference.others)

    def check(self, model: AdaptedModel, stage: str) -> float:
        """Return the largest deviation of a linear as a fraction of its bound; 0 without adapters.

        Args:
            model: the IR after `stage`.
            stage: the reader or pass that made `model`, for the message.

        Raises:
            ParityError: a linear is off, or adapted on one side only.
        """
        return max(self._check_task(model, stage, reference) for reference in self._references)

    def _check_task(self, model: AdaptedModel, stage: str, reference: LayerOutputs) -> float:
        wanted = reference.wanted
        if set(model.adapters) != set(wanted):
            odd = sorted(set(model.adapters) ^ set(wanted))
            raise ParityError(
                f"after {stage}, {odd[0]} is adapted on one side only",
                expected=f"the same {len(wanted)} linears as the reference adapts",
            )
        if len(self._references) > 1:
            stage += f", for task {reference.task_id}"
        errors = [
            self._check_linear(
                path,
                wanted[path],
                self.probe.output(model, path, reference.task_id),
                unit_roundoff(model.weights[model.adapters[path].parameter].dtype),
                stage,
            )
            for path in wanted
        ]
        return max(errors, default=0.0)

    def _check_linear(
        self,
        path: str,
        wanted: tuple[Float64, float],
        output: LinearOutput,
        roundoff: float,
        stage: str,
    ) -> float:
        (want, largest), got = wanted, output.total
        bound = 1e-5 * largest + 2.0**-40 * output.scale
        if not output.branches.any():
            bound = bound + roundoff * output.scale
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
