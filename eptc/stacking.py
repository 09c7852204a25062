"""Several tasks in one engine: whether a checkpoint can have one, its heads, its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eptc.checkpoint import Checkpoint
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.ir import AdaptedModel
from eptc.parity_gate.memory import whole_model_bytes
from eptc.tasks import Task, TaskChoice
from eptc.tensors import LazyTensor

__all__ = ["check_stackable", "refused_blocks", "stack_bytes", "stacked_heads"]

_ALONE = "export each task by itself"


def check_stackable(source: Checkpoint, choice: TaskChoice, task_ids: Sequence[int]) -> None:
    """Check that one engine can serve several tasks of a checkpoint.

    Args:
        source: the checkpoint.
        choice: what the caller said.
        task_ids: the tasks that names.

    Raises:
        CheckpointError: what a task adds depends on the input.
        TaskError: that is but one task.
    """
    contents = source.contents
    routed = [path for path, a in contents.adapters.items() if a.input_router is not None]
    if routed or contents.prompts is not None:
        where = f"{routed[0]} routes on its input" if routed else "its prompts do"
        raise CheckpointError(
            f"what a task adds to {source.path} depends on the input: {where}",
            expected="routes that depend on the task alone, for several tasks in one engine",
            fix=_ALONE,
        )
    if len(task_ids) < 2:
        (task,) = [contents.tasks[task_id] for task_id in task_ids]
        raise TaskError(
            f"several tasks were asked for, {choice!r}, and that is {task.name!r} alone",
            expected="two tasks or more, for one engine of them",
            fix=f"give its name: {task.name}",
        )


def refused_blocks(source: Checkpoint, stored: str) -> OptionError:
    """Return why an engine of several tasks cannot be verified block by block."""
    narrow = stored in ("fp16-weights", "bf16-weights")
    return OptionError(
        "an engine of several tasks is verified as a whole, and this one cannot be: "
        + (
            f"its matrices are stored as {stored}, whose rounding adds up over blocks"
            if narrow
            else f"that takes {whole_model_bytes(source) / 1e9:.1f} GB"
        ),
        fix=("give --precision fp32" if narrow else "give --max-memory, where the machine has it")
        + f", or {_ALONE}, or --no-verify, which the manifest records",
    )


def stacked_heads(model: AdaptedModel, tasks: Sequence[Task]) -> list[Mapping[str, LazyTensor]]:
    """Return the parameters that replace the base's for each task, for all by the same names."""
    names = sorted({name for task in tasks for name in model.heads.get(task.name, {})})
    heads = [model.heads.get(task.name, {}) for task in tasks]
    return [{name: head.get(name) or model.weights[name] for name in names} for head in heads]


def stack_bytes(source: Checkpoint, task_ids: Sequence[int]) -> int:
    """Return how many bytes the factors of several tasks take, at most; nothing is read."""
    if len(task_ids) < 2:
        return 0
    total = 0
    for adapter in source.contents.adapters.values():
        first = adapter.branches[0].delta
        bounds = sorted(branch.delta.rank_bound for branch in adapter.branches)
        ranks = sum(bounds[-(source.contents.top_k or len(bounds)) :])
        rank = min(ranks, first.out_features, first.in_features)
        total += 4 * rank * (first.out_features + first.in_features)
    return total * len(task_ids)
