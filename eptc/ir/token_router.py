"""The paper's router that reads a linear's input: a route for each token."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from eptc.errors import InternalError
from eptc.ir.numbers import Float64, read
from eptc.ir.routing import InputRouter, Normalization, Unit
from eptc.tensors import ComputedTensor, LazyTensor

__all__ = ["TokenRouter"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRouter(InputRouter):
    """A router that reads each token of its linear's input x, and the task where it is told to.

        p = softmax(W (x + e_t) / temperature);  the top_k largest are kept, then normalised

    For a fixed task W e_t is a constant: the bias.

    Args:
        weight: W [experts, in].
        embedding: e [rows >= tasks, in]; None where the task is not read, or fixed.
        bias: W e_t [experts] of a fixed task; None where there is none.
        top_k: how many experts are kept, of equal logits the lower index first.
        temperature: divides the logits.
        normalization: `softmax` of the kept probabilities, division by their `sum`, or `none`.
    """

    weight: LazyTensor
    embedding: LazyTensor | None
    bias: LazyTensor | None
    top_k: int
    temperature: float
    normalization: Normalization
    unit: Unit = dataclasses.field(default="token", init=False)
    site: str | None = dataclasses.field(default=None, init=False)

    @property
    def num_experts(self) -> int:
        """How many experts the router chooses from."""
        return self.weight.shape[0]

    @property
    def reads_task(self) -> bool:
        """Whether the gates depend on a task that is not fixed yet."""
        return self.embedding is not None

    def for_task(self, task_id: int) -> TokenRouter:
        """Return the router of one task, its embedding folded into a bias in float64."""
        embedding, weight = self.embedding, self.weight
        if embedding is None:
            return self

        def bias() -> Float64:
            return np.array([math.fsum(row) for row in read(weight) * read(embedding)[task_id]])

        return dataclasses.replace(
            self,
            embedding=None,
            bias=ComputedTensor(f"{weight.name}.bias", "float64", (self.num_experts,), bias),
        )

    def gates(self, x: Float64) -> Float64:
        """Return the gates [batch, sequence, experts] for x [batch, sequence, in].

        Raises:
            InternalError: they depend on a task that is not fixed yet.
        """
        if self.reads_task:
            raise InternalError(f"the gates of {self.weight.name} were asked for without a task")
        logits = x @ read(self.weight).T
        if self.bias is not None:
            logits = logits + read(self.bias)
        logits = logits / self.temperature
        order = np.argsort(-logits, axis=-1, kind="stable")[..., : self.top_k]
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        kept = np.take_along_axis(p / p.sum(axis=-1, keepdims=True), order, axis=-1)
        if self.normalization == "softmax":
            kept = np.exp(kept - kept.max(axis=-1, keepdims=True))
        if self.normalization != "none":
            kept = kept / kept.sum(axis=-1, keepdims=True)
        gates = np.zeros_like(logits)
        np.put_along_axis(gates, order, kept, axis=-1)
        return gates

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The router's own tensors."""
        return tuple(t for t in (self.weight, self.embedding, self.bias) if t is not None)
