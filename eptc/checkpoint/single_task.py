"""The one task of a checkpoint that was trained on one, and does not say what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eptc.checkpoint.contents import ReadOptions
from eptc.errors import OptionError, TaskError
from eptc.tasks import Task

__all__ = ["DEFAULT_TASK", "single_task"]

DEFAULT_TASK = "default"


def single_task(options: ReadOptions, config: Mapping[str, Any], num_labels: int | None) -> Task:
    """Return the task of a checkpoint with one.

    Its name is what the caller says, else `default`; a description of that name, or the only one
    there is, says the rest. Without one a classifier has the labels of the base's configuration,
    as far as there are as many as its head has rows, and a model that writes has none.

    Args:
        options: what the caller says.
        config: the base's configuration.
        num_labels: rows of the classification head; None where the model has none.

    Raises:
        OptionError: several tasks are named, or a number of experts is given.
        TaskError: no description fits, or it does not fit the head, or several labels are right
            at once.
    """
    if options.top_k is not None:
        raise OptionError(
            f"--top-k {options.top_k} was given for a checkpoint that has one task",
            fix="leave it out: nothing is chosen by task",
        )
    names, specs = options.tasks, options.specs
    if names is not None and len(names) != 1:
        raise OptionError(
            f"--tasks names {len(names)} tasks", expected="one name: the checkpoint has one task"
        )
    if names is None and len(specs) > 1:
        raise TaskError(
            f"{len(specs)} tasks are described: {', '.join(specs)}",
            expected="one description, or --tasks NAME to say which is meant",
        )
    name = names[0] if names else next(iter(specs), DEFAULT_TASK)
    if specs and name not in specs:
        raise TaskError(f"there is no description of {name!r}", expected=", ".join(specs))
    task = specs[name] if specs else _undescribed(name, config, num_labels)
    if num_labels is not None and task.num_outputs != num_labels:
        raise TaskError(
            f"task {name!r} has {task.num_outputs} outputs, the head has {num_labels} rows",
            expected="a label for each row, in order",
            fix="correct the description, or leave --task-spec out",
        )
    return task


def _undescribed(name: str, config: Mapping[str, Any], num_labels: int | None) -> Task:
    if num_labels is None:
        return Task(name, "generation")
    if config.get("problem_type") == "multi_label_classification":
        raise TaskError(
            "the base's configuration says multi_label_classification: several labels at once",
            expected="a single label, or a value: an engine answers with the likeliest label",
            fix="if it was trained for single labels, describe them with --task-spec",
        )
    if num_labels == 1 or config.get("problem_type") == "regression":
        return Task(name, "regression")
    given = config.get("id2label")
    labels = [f"LABEL_{i}" for i in range(num_labels)]
    if isinstance(given, Mapping) and len(given) == num_labels:
        labels = [str(given.get(str(i), given.get(i, labels[i]))) for i in range(num_labels)]
    if len(set(labels)) != num_labels:
        labels = [f"LABEL_{i}" for i in range(num_labels)]
    return Task(name, "classification", labels=tuple(labels))
