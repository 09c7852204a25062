"""Heads of encoder classifiers: one copy of the classification head for each task."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eptc.errors import BaseModelError, CheckpointError, OptionError
from eptc.nn.linear import TaskContext, fill_parameter
from eptc.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "TaskHeads",
    "fill_heads",
    "head_module",
    "install_heads",
    "last_linear",
    "modules_of",
]


class TaskHeads(nn.Module):
    """Stands in a module's place and calls the active task's copy of it.

    Args:
        modules: one module a task, in the order of their ids.
        context: which task is active.
    """

    def __init__(self, modules: Sequence[nn.Module], context: TaskContext) -> None:
        super().__init__()
        self.tasks = nn.ModuleList(modules)
        self.context = context

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return what the active task's module returns.

        Raises:
            TaskError: no task is active.
        """
        output = self.tasks[self.context.active](*args, **kwargs)
        assert isinstance(output, Tensor)
        return output


def head_module(hf_model: PreTrainedModel) -> str:
    """Return the full name of a sequence classifier's head.

    Raises:
        BaseModelError: the model has none that is known.
    """
    for name in ("classifier", "score"):
        if hasattr(hf_model, name):
            return name
    raise BaseModelError(
        f"{type(hf_model).__name__} has no classification head", expected="'classifier' or 'score'"
    )


def modules_of(names: Collection[str], head: str) -> list[str]:
    """Return the modules that own some parameters: the head, or a parameter's own module."""
    owners = {name.rpartition(".")[0] for name in names if not name.startswith(f"{head}.")}
    return sorted(owners)


def install_heads(
    hf_model: PreTrainedModel,
    tasks: Sequence[Task],
    context: TaskContext,
    *,
    modules: Collection[str],
    generator: torch.Generator,
) -> dict[str, TaskHeads]:
    """Put a copy for each task in the place of the head and of other modules.

    A copy of the head has as many outputs as its task; where the base's has another number, its
    last linear is freshly drawn. All other parameters start as the base's.

    Args:
        hf_model: a sequence classifier, changed in place.
        tasks: in the order of their ids.
        context: which task is active.
        modules: full names of further modules that each task has its own copy of.
        generator: of the random numbers.

    Raises:
        BaseModelError: the model has no head.
        OptionError: a task cannot have a head, or a module is not there.
    """
    for task in tasks:
        if task.kind not in ("classification", "regression"):
            raise OptionError(
                f"task {task.name!r} is {task.kind!r} and the base is an encoder",
                expected="'classification' or 'regression'",
            )
    head = head_module(hf_model)
    std = getattr(hf_model.config, "initializer_range", 0.02)
    installed = {}
    for name in (head, *modules):
        try:
            module = hf_model.get_submodule(name)
        except AttributeError as error:
            raise OptionError(f"the base has no module {name!r}") from error
        copies = [copy.deepcopy(module).requires_grad_(True) for _ in tasks]
        if name == head:
            copies = [
                _resize(c, task.num_outputs, std, generator)
                for c, task in zip(copies, tasks, strict=True)
            ]
        installed[name] = TaskHeads(copies, context)
        hf_model.set_submodule(name, installed[name])
    return installed


def _resize(head: nn.Module, outputs: int, std: float, generator: torch.Generator) -> nn.Module:
    """Return the head with a last linear of another width; a head may be that linear."""
    name, old = last_linear(head)
    if old.out_features == outputs:
        return head
    new = nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    nn.init.normal_(new.weight, std=std, generator=generator)
    if old.bias is not None:
        nn.init.zeros_(new.bias)
    if not name:
        return new
    head.set_submodule(name, new)
    return head


def last_linear(head: nn.Module, path: str = "") -> tuple[str, nn.Linear]:
    """Return the full name of a head's last linear, and the linear: it gives the outputs.

    Args:
        head: the head; it may be that linear.
        path: the head's own full name.

    Raises:
        BaseModelError: the head has no linear.
    """
    linears = [
        (name, m) for name, m in head.named_modules(prefix=path) if isinstance(m, nn.Linear)
    ]
    if not linears:
        raise BaseModelError(f"the classification head {type(head).__name__} has no linear")
    return linears[-1]


def fill_heads(
    heads: Mapping[str, TaskHeads],
    tasks: Sequence[Task],
    stored: Mapping[str, Mapping[str, Tensor]],
    needed: Mapping[str, Collection[str]],
) -> None:
    """Set the heads' parameters from a checkpoint; one it does not have stays the base's.

    Args:
        heads: by the module they stand for.
        tasks: in the order of their ids.
        stored: parameters by task, then by name.
        needed: parameters that the base does not have, by task.

    Raises:
        CheckpointError: a task has no head, or a parameter does not fit.
    """
    for i, task in enumerate(tasks):
        tensors = stored.get(task.name, {})
        places = {
            f"{module}.{name}": parameter
            for module, copies in heads.items()
            for name, parameter in copies.tasks[i].named_parameters()
        }
        for name in sorted(set(needed[task.name]) - tensors.keys()):
            raise CheckpointError(f"task {task.name!r} has no {name}")
        for name, tensor in tensors.items():
            if name not in places:
                raise CheckpointError(f"the model has no place for heads.{task.name}.{name}")
            fill_parameter(places[name], tensor, f"heads.{task.name}.{name}")
