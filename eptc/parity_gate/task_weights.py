"""The weight gate of an engine of several tasks: base weights, each task's low ranks, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from eptc.errors import ParityError
from eptc.lower.weights import PACKED, STACKED
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.stored import read
from eptc.parity_gate.weights import check_close, check_equal, check_stored, plain_parameters

__all__ = ["check_task_weights"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_FIX = "this is a bug in the lowering: report it"


def check_task_weights(
    directory: Path, files: list[str], reference: ReferenceModel, task_ids: Sequence[int]
) -> list[float]:
    """Compare every weight in the files of an engine of several tasks with the reference's.

    The base's weights must be there to the bit, or, as integers, the nearest there are. Beside
    each adapted linear, base and B A of a task are compared with base and experts as a folded
    weight is. The parts of heads must be equal to the bit, and zero where another's is wider.

    Args:
        directory: the bundle's folder.
        files: its graphs.
        reference: the unfolded model.
        task_ids: the tasks by the reference's own list, in the order of the engine's.

    Returns:
        For each task the largest deviation of a linear, as a fraction of its bound.

    Raises:
        ParityError: a weight is off, or an adapted linear, or a head, is in no file.
    """
    parameters = [plain_parameters(reference, task_id) for task_id in task_ids]
    shared, own = _sorted_out(parameters)
    check_stored(directory, files, shared, {}, task_ids[0])
    stacks = _Stacks(directory, files)
    worst = [0.0] * len(task_ids)
    for path, layer in reference.layers.items():
        factors = stacks.factors(path, shared.get(f"{path}.bias"))
        base = layer.weight.detach().numpy()
        for place, task_id in enumerate(task_ids):
            name = f"{path}.weight, with what task {reference.tasks[task_id].name} adds,"
            total = base.astype(np.float64)
            if factors is not None:
                a, b = (factor[place].astype(np.float64) for factor in factors)
                total = total + (a @ b).T
            delta = layer.dense(task_id).numpy()
            error = check_close(name, total.astype(np.float32), base, delta)
            worst[place] = max(worst[place], error)
    for name in own:
        stack = stacks.head(name)
        for place, found in enumerate(parameters):
            task = reference.tasks[task_ids[place]].name
            _check_head(f"{name} of task {task}", stack[place], found[name])
    stacks.finish()
    return worst


def _sorted_out(
    parameters: Sequence[Mapping[str, Float32]],
) -> tuple[dict[str, Float32], list[str]]:
    """Return the parameters that tasks share, and the names of those that each has of its own."""
    first = parameters[0]
    own = [name for name in first if any(p[name] is not first[name] for p in parameters[1:])]
    own = [n for n in own if any(not np.shares_memory(p[n], first[n]) for p in parameters[1:])]
    return {name: array for name, array in first.items() if name not in own}, own


class _Stacks:
    """What an engine's graphs hold by task, read when it is asked for."""

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        self._stored: dict[str, onnx_ir.TensorProtocol] = {}
        # Where the columns of each linear's A are: the stack that holds them, and before whom.
        self._columns: dict[str, str] = {}
        for file in files:
            for name, value in onnx_ir.load(directory / file).graph.initializers.items():
                if STACKED in name and value.const_value is not None:
                    self._stored[name] = value.const_value
                    self._columns |= dict.fromkeys(name.split(PACKED), name)
        self._left = set(self._stored)

    def factors(self, path: str, bias: Float32 | None) -> tuple[Array, Array] | None:
        """Return A [tasks, in, k] and B [tasks, k, out] of a linear; None where it has none.

        Raises:
            ParityError: one without the other, or behind B another bias than the linear's.
        """
        up = self._up(path)
        if up is None:
            return None
        a_name = f"{path}{STACKED}A"
        if a_name not in self._columns:
            raise ParityError(f"the engine has {up} and no {a_name}", fix=_FIX)
        stack = self._columns[a_name]
        start = 0
        for name in stack.split(PACKED):
            width = self._rank(name)
            if name == a_name:
                break
            start += width
        self._left -= {up, stack}
        b = read(self._stored[up])
        if PACKED in up:
            name = up.partition(PACKED)[2]
            if bias is None:
                raise ParityError(f"the engine has {name}, the reference none", fix=_FIX)
            for row in b[:, -1]:
                check_equal(name, row, bias)
        return read(self._stored[stack])[..., start : start + width], b[:, :width]

    def _up(self, path: str) -> str | None:
        """Return the name of B, which may have the bias as its last row."""
        b_name = f"{path}{STACKED}B"
        names = (b_name, f"{b_name}{PACKED}{path}.bias")
        return next((name for name in names if name in self._stored), None)

    def _rank(self, a_name: str) -> int:
        up = self._up(a_name.removesuffix(f"{STACKED}A"))
        if up is None:
            raise ParityError(f"the engine has {a_name} and no B beside it", fix=_FIX)
        rows = self._stored[up].shape[1]
        assert isinstance(rows, int)
        return rows - (PACKED in up)

    def head(self, name: str) -> Array:
        """Return a parameter of each task's head: [tasks, in, out] or [tasks, out]."""
        path, _, part = name.rpartition(".")
        stack = f"{path}{STACKED}{part}"
        if stack not in self._stored:
            raise ParityError(f"the engine has no {stack}, and each task its own {name}", fix=_FIX)
        self._left.discard(stack)
        return read(self._stored[stack])

    def finish(self) -> None:
        """Raise ParityError where something is stacked that the reference does not have."""
        if self._left:
            raise ParityError(
                f"the engine stacks {min(self._left)}, and the checkpoint adapts no such linear",
                fix=_FIX,
            )


def _check_head(name: str, found: Array, want: Float32) -> None:
    """Compare a task's part of a stack, [in, out] or [out], with the reference's own."""
    found = found.T if found.ndim == 2 else found
    outputs = len(want)
    if found[outputs:].any():
        raise ParityError(f"{name} goes beyond its {outputs} outputs in the engine", fix=_FIX)
    check_equal(name, found[:outputs], want)
