"""Routers: from logits over the experts to the few that are used, and their weights."""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from eptc.nn.rules import GateConfig

# Of the sum of |w| |u| behind a logit: what sums in another order, in this linear and in those
# before it, may move it by. Over the tested models they move x by up to a millionth of itself.
CLOSE = 2.0**-19

__all__ = ["Gates", "Route", "Router", "TaskRouter", "TokenRouter"]


class Gates(NamedTuple):
    """The gates of one forward.

    Args:
        values: broadcastable to [..., N] for an input [..., in]; 0 for experts not chosen.
        experts: those whose gate may differ from 0, in the order their outputs are summed.
    """

    values: Tensor
    experts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Route:
    """Which experts a task uses in one linear.

    Args:
        experts: chosen experts, most probable first.
        weights: their gates, in the same order.
        margin: log p of the last expert chosen minus log p of the first one left out;
            infinite where none is left out.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]
    margin: float


class Router(nn.Module, abc.ABC):
    """Chooses experts by p = softmax((W u + b) / temperature), the top_k largest kept.

    A subclass says what u is: a task embedding, an input, or both.

    Args:
        in_features: width of u.
        num_experts: N; W is [N, in], b [N].
        top_k: how many experts are kept.
        gate: temperature and normalization.
        bias: whether there is a b.
    """

    def __init__(
        self, in_features: int, num_experts: int, top_k: int, gate: GateConfig, *, bias: bool
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = gate
        self.weight = nn.Parameter(torch.zeros(num_experts, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    @abc.abstractmethod
    def forward(self, x: Tensor, embedding: Tensor) -> Gates:
        """Return the gates for an input x [..., in] and the task's embedding [in]."""

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the experts kept for u [..., in], their gates, and every log p in that order.

        Shapes [..., K], [..., K], [..., N]. Sorted by logit, as probabilities underflow at low
        temperatures; of equal logits the lower index comes first.
        """
        logits = functional.linear(u, self.weight, self.bias)
        if self.gate.temperature != 1.0:
            logits = logits / self.gate.temperature
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., : self.top_k]
        kept = logits.softmax(-1).gather(-1, chosen)
        if self.gate.normalization == "softmax":
            kept = kept.softmax(-1)
        elif self.gate.normalization == "sum":
            kept = kept / kept.sum(-1, keepdim=True)
        return chosen, kept, logits.log_softmax(-1).gather(-1, order)


class TaskRouter(Router):
    """A router that reads the task's embedding alone: one route for a whole batch."""

    def forward(self, x: Tensor, embedding: Tensor) -> Gates:  # noqa: ARG002  (interface)
        """Return gates [N], whatever x is."""
        chosen, kept, log_p = self.select(embedding)
        return Gates(torch.zeros_like(log_p).scatter(-1, chosen, kept), tuple(chosen.tolist()))

    @torch.no_grad()
    def route(self, embedding: Tensor) -> Route:
        """Return the experts, weights and margin for an embedding [in]."""
        chosen, kept, log_p = self.select(embedding)
        k = self.top_k
        margin = float(log_p[k - 1] - log_p[k]) if k < len(log_p) else float("inf")
        return Route(tuple(chosen.tolist()), tuple(kept.tolist()), margin)


class TokenRouter(Router):
    """A router that reads the linear's input: a route for each position.

    u = x, or x + e where the gate's router input is `token+task`.
    """

    def forward(self, x: Tensor, embedding: Tensor) -> Gates:
        """Return gates [..., N] for x [..., in]; any expert may be chosen somewhere."""
        chosen, kept, log_p = self.select(self._input(x, embedding))
        values = torch.zeros_like(log_p).scatter(-1, chosen, kept)
        return Gates(values, tuple(range(values.shape[-1])))

    @torch.no_grad()
    def close(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return whether the last expert chosen leads by no more than rounding, [...] bool."""
        if self.top_k >= len(self.weight):
            return torch.zeros(x.shape[:-1], dtype=torch.bool)
        u = self._input(x, embedding)
        ranked = functional.linear(u, self.weight, self.bias).sort(dim=-1, descending=True).values
        terms = functional.linear(u.abs(), self.weight.abs()).amax(-1)
        return ranked[..., self.top_k - 1] - ranked[..., self.top_k] <= CLOSE * terms

    def _input(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + embedding if self.gate.router_input == "token+task" else x
