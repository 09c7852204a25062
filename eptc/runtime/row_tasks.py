"""Which of an engine's tasks each row of a batch is of, and what that means for the row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eptc.errors import BundleError, InputError, TaskError
from eptc.runtime.spec import TASK_IDS, GraphSpec
from eptc.tasks import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.manifest import Manifest
    from eptc.tasks import Task

__all__ = ["RowTasks", "TaskName", "check_task_ids", "check_tasks", "of_task"]

# By its name, an alias, or its place in the engine's list.
TaskName = str | int


class RowTasks:
    """The tasks of an engine; a task is known by its place in the list.

    Args:
        manifest: of one task, of none (a bare model), or of several.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.tasks: tuple[Task | None, ...] = manifest.tasks or (manifest.task,)
        self._several = bool(manifest.tasks)
        self._manifest = manifest

    def places(
        self, count: int, wanted: TaskName | Sequence[TaskName] | None, what: str = "texts"
    ) -> NumpyArray:
        """Return the task of each row, int64 [count].

        Args:
            count: how many rows there are.
            wanted: one task for all of them, or one for each; None where the engine has one.
            what: the rows are called, for messages.

        Raises:
            TaskError: no task where there are several, one that the engine does not have, or what
                is no list of them.
            InputError: more or fewer tasks than rows.
        """
        if wanted is None:
            if self._several:
                raise TaskError(
                    f"the engine has {len(self.tasks)} tasks, and none was named for the {what}",
                    expected=_listed(self.tasks),
                    fix="name one for all of them, or one for each",
                )
            return np.zeros(count, np.int64)
        if isinstance(wanted, str | int | np.integer):
            return np.full(count, self._place(wanted), np.int64)
        # A set has no order of its own: which row would be of which task?
        listed = isinstance(wanted, Sequence) and not isinstance(wanted, bytes)
        if not listed and not (isinstance(wanted, np.ndarray) and wanted.ndim == 1):
            raise TaskError(
                f"the tasks are {wanted!r}", expected="a task's name, or a list of names"
            )
        if len(wanted) != count:
            raise InputError(
                f"there are {len(wanted)} tasks for {count} {what}",
                expected="one for all of them, or one for each",
            )
        return np.array([self._place(name) for name in wanted], np.int64)

    def at(self, places: Iterable[int]) -> list[Task | None]:
        """Return the tasks at some places."""
        return [self.tasks[place] for place in places]

    def limits(self, places: NumpyArray) -> list[int | None]:
        """Return how many tokens a text of each row may have."""
        found = [_max_length(self._manifest, task) for task in self.tasks]
        return [found[place] for place in places]

    def new_tokens(self, places: NumpyArray, given: int | None) -> list[int]:
        """Return how many tokens an engine that writes may write for each row, at most.

        Args:
            places: the task of each row.
            given: what the caller said; None: what the manifest says of each task.
        """
        return [self._new_tokens(place) if given is None else given for place in places]

    def feeds(self, places: NumpyArray) -> dict[str, NumpyArray]:
        """Return what the graphs are fed to know the task of each row."""
        return {TASK_IDS: places} if self._several else {}

    def _new_tokens(self, place: int) -> int:
        settings = self._manifest.generation
        assert settings is not None
        return settings.task_max_new_tokens[place] if self._several else settings.max_new_tokens

    def _place(self, name: object) -> int:
        known = [task for task in self.tasks if task is not None]
        if not isinstance(name, str | int | np.integer) or isinstance(name, bool):
            raise TaskError(f"a task is {name!r}", expected=_listed(known))
        if not known:
            raise TaskError(
                f"task {name!r} was named, and the engine is of no task", fix="leave it out"
            )
        if isinstance(name, str):
            return resolve(name, known)
        if not 0 <= name < len(known):
            raise TaskError(f"there is no task {name}", expected=_listed(known))
        return int(name)


def check_tasks(manifest: Manifest) -> None:
    """Raise BundleError where the parts of an engine of several tasks do not go together."""
    told = [name for name, graph in manifest.graphs.items() if TASK_IDS in graph.input_names]
    if not manifest.tasks:
        if told:
            raise BundleError(f"graph {told[0]!r} reads {TASK_IDS}, and there are no tasks")
        return
    names = [task.name for task in manifest.tasks]
    if manifest.task is not None or len(names) < 2 or len(set(names)) < len(names):
        raise BundleError(
            f"the engine is of the tasks {', '.join(names)}, and of "
            + ("none alone" if manifest.task is None else manifest.task.name),
            expected="two tasks or more, each once, or one alone",
        )
    if missing := [name for name in manifest.graphs if name not in told]:
        raise BundleError(f"graph {missing[0]!r} has no {TASK_IDS}, and there are tasks")
    widest = max(task.num_outputs for task in manifest.tasks)
    if manifest.kind == "encoder-classifier" and widest != manifest.num_labels:
        raise BundleError(
            f"the widest task has {widest} outputs, num_labels is {manifest.num_labels}"
        )
    limits = () if manifest.generation is None else manifest.generation.task_max_new_tokens
    if manifest.generation is not None and len(limits) != len(names):
        raise BundleError(
            f"there are {len(names)} tasks, and task_max_new_tokens of {len(limits)}"
        )


def check_task_ids(ids: NumpyArray, tasks: Sequence[Task | None]) -> None:
    """Refuse a place that no task has: CUDA would read zeros there.

    Raises:
        InputError: with the places there are.
    """
    outside = ids[(ids < 0) | (ids >= len(tasks))]
    if outside.size:
        raise InputError(f"{TASK_IDS!r} has {outside.flat[0]}", expected=_listed(tasks))


def of_task(manifest: Manifest, place: int) -> Manifest:
    """Return the manifest of one task's engine, by that of an engine of several.

    Its graphs are not told a task, and a classifier's logits are as wide as the task's head.
    """
    task = manifest.tasks[place]
    settings, tokenizer = manifest.generation, manifest.tokenizer
    if settings is not None:
        settings = dataclasses.replace(
            settings,
            max_new_tokens=settings.task_max_new_tokens[place],
            task_max_new_tokens=(),
        )
    if tokenizer is not None:
        tokenizer = dataclasses.replace(tokenizer, max_length=_max_length(manifest, task))
    width = None if manifest.num_labels is None else task.num_outputs
    return dataclasses.replace(
        manifest,
        task=task,
        tasks=(),
        num_labels=width,
        graphs={name: _alone(spec, width) for name, spec in manifest.graphs.items()},
        generation=settings,
        tokenizer=tokenizer,
    )


def _alone(spec: GraphSpec, width: int | None) -> GraphSpec:
    """Return a graph's interface without the task, its logits of some width."""
    inputs = tuple(tensor for tensor in spec.inputs if tensor.name != TASK_IDS)
    outputs = spec.outputs
    if width is not None:
        outputs = tuple(
            dataclasses.replace(tensor, shape=(*tensor.shape[:-1], width))
            if tensor.name == "logits"
            else tensor
            for tensor in outputs
        )
    return dataclasses.replace(spec, inputs=inputs, outputs=outputs)


def _max_length(manifest: Manifest, task: Task | None) -> int | None:
    """Return how many tokens a text of a task may have; None where there is no bound."""
    if manifest.tokenizer is None:
        return None
    limits = [manifest.tokenizer.max_length]
    if manifest.tasks and task is not None:
        limits.append(task.max_length)
    return min((limit for limit in limits if limit is not None), default=None)


def _listed(tasks: Sequence[Task | None]) -> str:
    return ", ".join(f"{i} {task.name}" for i, task in enumerate(tasks) if task is not None)
