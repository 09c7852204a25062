"""Routers: which experts a task, or an input, uses in a linear."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from eptc.errors import CheckpointError
from eptc.ir.numbers import Float64, read, softmax
from eptc.tensors import LazyTensor

__all__ = ["InputRouter", "Normalization", "Route", "TaskRouter", "Unit"]

Normalization = Literal["softmax", "sum", "none"]
Unit = Literal["token", "row", "batch"]


class InputRouter(abc.ABC):
    """A router that reads what a linear is given: its gates are known when the engine runs.

    Attributes:
        unit: what has gates of its own: each token, each row of a batch, or the batch as a whole.
        site: path of the linear whose input it reads; its gates hold for every linear after it,
            until it is executed again. None: each linear routes on its own input.
    """

    unit: Unit
    site: str | None

    @property
    @abc.abstractmethod
    def num_experts(self) -> int:
        """How many experts the router chooses from."""

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The router's own tensors."""

    @property
    def reads_task(self) -> bool:
        """Whether the gates depend on a task that is not fixed yet."""
        return False

    def for_task(self, task_id: int) -> InputRouter:  # noqa: ARG002  (interface)
        """Return the router of one task."""
        return self

    @abc.abstractmethod
    def gates(self, x: Float64) -> Float64:
        """Return the gates for an input x [batch, sequence, in], 0 for experts not chosen.

        [batch, sequence, experts] for tokens, [batch, 1, experts] for rows, [1, 1, experts] for
        the batch.
        """


@dataclasses.dataclass(frozen=True)
class Route:
    """Which experts a task uses in one linear.

    Args:
        experts: chosen experts, largest probability first.
        weights: their mixing weights, in the same order.
        margin: log p of the last expert chosen minus log p of the first one left out;
            infinite where none is left out. Tiny margins can flip under other arithmetic.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    margin: float


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRouter:
    """A router that reads the task embedding alone: static for a fixed task.

        p = softmax((G e_t + b) / temperature);  the top_k largest are kept, then normalised

    Args:
        weight: G [experts, in].
        bias: b [experts], or None.
        embedding: e [rows >= tasks, in].
        top_k: how many experts are kept; clamped to [1, experts].
        temperature: divides the logits.
        normalization: `softmax` of the kept probabilities (released code), division by their
            `sum` (paper), or `none`.
    """

    weight: LazyTensor
    bias: LazyTensor | None
    embedding: LazyTensor
    top_k: int
    temperature: float
    normalization: Normalization

    @property
    def num_experts(self) -> int:
        """How many experts the router chooses from."""
        return self.weight.shape[0]

    def probabilities(self, task_id: int) -> tuple[float, ...]:
        """Return p [experts] for the embedding row `task_id`, the same on every machine.

        Raises:
            CheckpointError: a logit is beyond float64.
        """
        embedding = read(self.embedding)[task_id]
        bias = np.zeros(self.num_experts) if self.bias is None else read(self.bias)
        logits = [
            math.fsum((*row, b)) / self.temperature
            for row, b in zip(read(self.weight) * embedding, bias, strict=True)
        ]
        if not all(map(math.isfinite, logits)):
            raise CheckpointError(
                f"the router's logits divided by its temperature {self.temperature} overflow",
                expected="finite numbers",
                fix="the temperature is beyond what the checkpoint can have trained with",
            )
        return softmax(logits)

    def route(self, task_id: int) -> Route:
        """Return a task's experts and weights; of equal probabilities the lower index wins."""
        p = self.probabilities(task_id)
        k = min(max(self.top_k, 1), self.num_experts)
        order = sorted(range(len(p)), key=lambda e: (-p[e], e))
        kept = tuple(p[e] for e in order[:k])
        if self.normalization == "softmax":
            kept = softmax(kept)
        elif self.normalization == "sum":
            kept = tuple(value / math.fsum(kept) for value in kept)
        return Route(tuple(order[:k]), kept, _margin([p[e] for e in order], k))

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The router's own tensors."""
        return tuple(t for t in (self.weight, self.bias, self.embedding) if t is not None)


def _margin(descending: Sequence[float], k: int) -> float:
    """Log of the last probability kept over the first one left out."""
    if k == len(descending) or descending[k] == 0.0:
        return math.inf
    return math.log(descending[k - 1]) - math.log(descending[k])
