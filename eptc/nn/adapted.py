"""What every reference offers: a Hugging Face model whose linears carry branches."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from eptc.tasks import Task, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AdaptedLinear", "ReferenceModel", "SingleTaskModel", "Undecided"]


class Undecided:
    """Rows of a batch in which a choice of experts was within rounding of another.

    Other arithmetic may choose otherwise there, and be as right.

    Attributes:
        rows: their positions.
    """

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def note(self, close: Tensor) -> None:
        """Take note of choices [batch, ...] that were close."""
        self.rows |= set(close.flatten(1).any(1).nonzero().flatten().tolist())


class AdaptedLinear(nn.Module, abc.ABC):
    """y = W0 x + bias + delta(x): a linear of the base with branches beside its weight.

    Args:
        base: the linear that is adapted; it stays as it is.
        path: the linear's full name in its model.
    """

    def __init__(self, base: nn.Linear, path: str) -> None:
        super().__init__()
        self.base = base
        self.path = path

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.base.out_features

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight: models read its dtype (T5's feed forward does)."""
        return cast("nn.Parameter", self.base.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias."""
        return cast("nn.Parameter | None", self.base.bias)

    @property
    def routed_experts(self) -> int:
        """How many experts a router that reads the input chooses from; 0 where none does."""
        return 0

    @property
    def folds(self) -> bool:
        """Whether an engine can have the branches in its weight: no gate reads the input."""
        return not self.routed_experts

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out] for x [..., in]."""
        y: Tensor = self.base(x)
        return y + self.delta(x)

    @abc.abstractmethod
    def delta(self, x: Tensor, task_id: int | None = None) -> Tensor:
        """Return what the branches add [..., out] for x [..., in].

        Args:
            x: the input.
            task_id: the task; None: the active one.
        """

    @abc.abstractmethod
    def dense(self, task_id: int | None = None) -> Tensor:
        """Return the matrix [out, in] the branches stand for, where no gate reads the input."""

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return what the branches add [..., out] for x [..., in] under given gates [experts].

        Only where `routed_experts` is not 0.
        """
        raise NotImplementedError(f"{self.path} has no gates that read its input")


class ReferenceModel(nn.Module, abc.ABC):
    """A Hugging Face model that gives a system's own answers, in eval mode.

    Attributes:
        hf: the Hugging Face model; use it inside `with model.task(name):`.
        layers: the adapted linears, by their full names.
        heads: per-task modules, by the full name of the module they stand for.
        prompts: positions that prompts before the text take.
    """

    hf: PreTrainedModel
    layers: Mapping[str, AdaptedLinear]
    heads: Mapping[str, Any]
    prompts: int = 0

    @property
    @abc.abstractmethod
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order of their ids."""

    @abc.abstractmethod
    def task(self, task: str | int) -> AbstractContextManager[int]:
        """Make a task the active one, by name, alias or id; yield its id."""

    @contextlib.contextmanager
    def undecided(self) -> Iterator[Undecided]:
        """Yield what takes note of choices within rounding until the context is left."""
        yield Undecided()

    @abc.abstractmethod
    def plain_name(self, name: str, task_id: int) -> str:
        """Return the name a parameter of `hf` has in the plain task model; empty where none."""


class SingleTaskModel(ReferenceModel):
    """A reference of a system that trains one task: no heads beside the base's own.

    A subclass sets `layers`.

    Args:
        hf_model: the task model.
        task: what it was trained on.
    """

    def __init__(self, hf_model: PreTrainedModel, task: Task) -> None:
        super().__init__()
        self.hf = hf_model
        self.heads = {}
        self._task = task

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The one task."""
        return (self._task,)

    @contextlib.contextmanager
    def task(self, task: str | int) -> Iterator[int]:
        """Check that a task is the one there is; yield its id.

        Raises:
            TaskError: there is no such task.
        """
        yield resolve(task, self.tasks)

    def plain_name(self, name: str, task_id: int) -> str:  # noqa: ARG002  # there is one
        """Return the name a parameter of `hf` has in the plain task model; empty where none."""
        for path in self.layers:
            if name.startswith(f"{path}."):
                part = name.removeprefix(f"{path}.")
                return f"{path}.{part.removeprefix('base.')}" if part.startswith("base.") else ""
        return name
