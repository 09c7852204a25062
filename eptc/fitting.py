"""Whether base, heads and task go together: asked before anything is read or traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eptc import checkpoint
from eptc.describe import OPSET
from eptc.errors import BaseModelError, CheckpointError, TaskError
from eptc.ir import AdaptedModel
from eptc.pipeline import adapter_passes
from eptc.skeletons import known_parameters

__all__ = ["check_fit", "stacked_model", "task_config"]

# What transformers raises where a configuration has values of the wrong kind.
_BAD_CONFIG = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def stacked_model(source: checkpoint.Checkpoint, task_ids: Sequence[int]) -> AdaptedModel:
    """Return the model whose engine serves several tasks: its head is as wide as the widest.

    The labels have no names in its configuration: each task has its own.
    """
    tasks = [source.contents.tasks[task_id] for task_id in task_ids]
    if source.base.architecture.kind != "encoder-classifier":
        return source.model
    names = [f"LABEL_{i}" for i in range(max(task.num_outputs for task in tasks))]
    labels = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return source.model.replace(config={**source.model.config, **labels})


def task_config(source: checkpoint.Checkpoint, *task_ids: int) -> Any:
    """Return the configuration transformers builds the model of a task, or of several, from.

    Raises:
        BaseModelError: transformers cannot build a model from it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if len(task_ids) == 1:
        fixed = adapter_passes(*task_ids)[0].rewrite(source.model)
    else:
        fixed = stacked_model(source, task_ids)
    try:
        return CONFIG_MAPPING[str(fixed.config["model_type"])].from_dict(dict(fixed.config))
    except (*_BAD_CONFIG, StrictDataclassError) as error:
        raise _no_model(source, error) from error


def check_fit(source: checkpoint.Checkpoint, task_id: int, config: Any) -> None:
    """Check that base and heads have every parameter of the task model in its shape, no other.

    Raises:
        BaseModelError: the first three that are missing, of another shape or without a place.
        CheckpointError: a head's parameter that the task model does not have.
        TaskError: the task's kind does not go with the model.
    """
    task = source.contents.tasks[task_id]
    encoder = source.base.architecture.kind == "encoder-classifier"
    if encoder != (task.kind in ("classification", "regression")):
        raise TaskError(
            f"task {task.name!r} is a {task.kind} task, the base is a "
            f"{source.base.config.get('model_type')} {source.base.architecture.kind}",
            expected="classification or regression" if encoder else "text-to-text or generation",
            fix="describe the task with --task-spec"
            if source.contents.format == "released"
            else None,
        )
    head = source.contents.heads.get(task.name, {})
    found = {**source.weights, **head}
    expected = _expected_parameters(source, config)
    wrong = []
    for name, shape in expected.items():
        if name not in found:
            wrong.append(f"{name} {list(shape)} is missing")
        elif found[name].shape != shape:
            wrong.append(f"{name} is {list(found[name].shape)}, not {list(shape)}")
    if wrong:
        raise BaseModelError(
            f"the base model {source.base.path} does not fit its configuration in {len(wrong)} "
            f"tensors: {'; '.join(wrong[:3])}",
            expected=f"the parameters of {source.base.architecture.task_class}"
            + ("" if head or not encoder else f", or a head for task {task.name!r}"),
            fix="give a complete base model with --base",
        )
    if lost := sorted(set(source.weights) - set(expected)):
        raise BaseModelError(
            f"the base model {source.base.path} has {len(lost)} tensors without a place in the "
            f"model that its config.json describes: {', '.join(lost[:3])}",
            expected=f"the parameters of {source.base.architecture.task_class}",
            fix="give a base model with its own config.json",
        )
    for name, parameters in source.contents.heads.items():
        if lost := sorted(set(parameters) - set(expected)):
            raise CheckpointError(
                f"the head of task {name!r} in {source.path} has the parameter {lost[0]}",
                expected=f"parameters of {source.base.architecture.task_class}",
            )


def _expected_parameters(
    source: checkpoint.Checkpoint, config: Any
) -> Mapping[str, tuple[int, ...]]:
    try:
        return known_parameters(
            config, opset=OPSET, tied_head=source.base.tied_head, prompts=source.contents.prompts
        )
    except _BAD_CONFIG as error:
        raise _no_model(source, error) from error


def _no_model(source: checkpoint.Checkpoint, error: Exception) -> BaseModelError:
    return BaseModelError(
        f"{source.base.path / 'config.json'} describes no model that transformers can build: "
        f"{type(error).__name__}: {error}",
        expected=f"the configuration of a {source.base.architecture.task_class}",
        fix="give the base model with its own config.json",
    )
