"""`TuckaLinear`: a linear whose input is edited by experts that the model's router chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from eptc.errors import CheckpointError, InternalError
from eptc.nn.adapted import AdaptedLinear

__all__ = ["RouteState", "Routing", "TuckaLinear", "TuckaRouter"]

Routing = Literal["batch", "per-sample"]


@dataclasses.dataclass
class RouteState:
    """The route in force: what the router's last call left for every linear after it.

    Args:
        site: path of the linear that has the router.
        group: the chosen group [routes]: one route for all rows, or one a row.
        weights: of the group's experts [routes, experts].
        calls: the routes of the calls so far, where they are recorded; else None.
    """

    site: str
    group: Tensor | None = None
    weights: Tensor | None = None
    calls: list[tuple[Tensor, Tensor]] | None = None

    def set(self, group: Tensor, weights: Tensor) -> None:
        """Put another route in force."""
        self.group, self.weights = group, weights
        if self.calls is not None:
            self.calls.append((group, weights))


class TuckaRouter(nn.Module):
    """Chooses a group of experts by the mean of an input, and weighs each expert of it.

    With m the mean over batch and sequence, padding included, E the centroids and l = E m seen as
    [groups, experts]:

        s = sigmoid(l / |l|), the norm over each group;  group = that of the largest s
        weights = the group's s, not normalised

    Args:
        centroids: E [groups * experts, in].
        groups: how many groups.
        routing: `batch`: one mean for all rows, as the authors' code has it. `per-sample`: a mean
            for each row over its own positions.
    """

    def __init__(self, centroids: Tensor, groups: int, routing: Routing) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centroids)
        self.groups = groups
        self.routing = routing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the group [routes] and its weights [routes, experts] for x [batch, length, in].

        One route under `batch`; under `per-sample` one a row.
        """
        x = x.float()
        mean = x.mean(0, keepdim=True).mean(1) if self.routing == "batch" else x.mean(1)
        logits = (mean @ self.centroids.T).reshape(len(mean), self.groups, -1)
        scores = torch.sigmoid(logits / torch.linalg.vector_norm(logits, dim=2, keepdim=True))
        best = torch.topk(scores.flatten(1), 1).indices[:, 0]
        group = best // scores.shape[2]
        return group, scores[torch.arange(len(group)), group]


class TuckaLinear(AdaptedLinear):
    """y = base(x + alpha * ((x U) M) U^T), M = sum over a group's experts of weight * core.

    U and the cores are normalised here, once: G by each group's whole norm, C and U by theirs.

    Args:
        base: the linear that is adapted; it stays as it is.
        parts: `g` [groups, slices, r, r], `c` [experts, slices] and `u` [in, r].
        alpha: the factor.
        state: the route in force; one object for all linears of a model.
        router: the router, in the linear that has it.
        path: the linear's full name in its model.
    """

    def __init__(
        self,
        base: nn.Linear,
        parts: Mapping[str, Tensor],
        alpha: float,
        state: RouteState,
        router: TuckaRouter | None,
        path: str,
    ) -> None:
        super().__init__(base, path)
        g, c, u = parts["g"], parts["c"], parts["u"]
        if u.shape[0] != base.in_features:
            raise CheckpointError(
                f"tucka_u of {path} has {u.shape[0]} rows",
                expected=f"{base.in_features}: the inputs of that linear of the base",
            )
        cores = g / torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True)
        mixing = c / torch.linalg.vector_norm(c)
        self.u = nn.Parameter(u / torch.linalg.vector_norm(u))
        self.cores = nn.Parameter(torch.einsum("iq,gqab->giab", mixing, cores))
        self.alpha = alpha
        self.state = state
        self.router = router
        self.constant_gates: Tensor | None = None

    @property
    def routed_experts(self) -> int:
        """How many experts all groups have."""
        return self.cores.shape[0] * self.cores.shape[1]

    @property
    def folds(self) -> bool:
        """Whether no input changes the route this linear runs under."""
        return self.constant_gates is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out] for x [..., in] under the route in force.

        Raises:
            CheckpointError: the router was not called before.
        """
        if self.router is not None:
            self.state.set(*self.router(x))
        if self.state.group is None or self.state.weights is None:
            raise CheckpointError(
                f"{self.path} is executed before {self.state.site}, whose input the router reads",
                expected="a router that is executed before every linear it routes",
                fix="its answers depend on the call before, so that it cannot be compiled",
            )
        chosen = self.cores[self.state.group]
        mixed = torch.einsum("be,beij->bij", self.state.weights, chosen)
        # One matrix for all rows, or one a row; a row may be one vector.
        low = x @ self.u
        edit = (low.unsqueeze(1) @ mixed).squeeze(1) if x.dim() == 2 else low @ mixed
        return cast("Tensor", self.base(x + self.alpha * (edit @ self.u.T)))

    def delta(self, x: Tensor, task_id: int | None = None) -> Tensor:
        """Return what the branches add [..., out] for x [..., in] under the constant route."""
        del task_id
        return self.mixed(x, self._constant())

    def dense(self, task_id: int | None = None) -> Tensor:
        """Return the matrix [out, in] the branches stand for under the constant route."""
        del task_id
        core = torch.einsum("e,eij->ij", self._constant(), self.cores.flatten(0, 1))
        return self.alpha * (self.weight @ self.u) @ core.T @ self.u.T

    def _constant(self) -> Tensor:
        if self.constant_gates is None:
            raise InternalError(f"{self.path} runs under routes that the input changes")
        return self.constant_gates

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return what the branches add [..., out] for x [..., in] under given gates.

        Args:
            x: the input.
            gates: of all groups' experts [groups * experts].
        """
        core = torch.einsum("e,eij->ij", gates, self.cores.flatten(0, 1))
        return self.alpha * (((x @ self.u) @ core) @ self.u.T) @ self.weight.T

    def gates(self, x: Tensor, task_id: int | None = None) -> Tensor:
        """Return the gates of all groups' experts [routes, groups * experts], 0 if not chosen.

        Args:
            x: the router's input [batch, length, in].
            task_id: of no consequence.

        Raises:
            InternalError: the linear has no router.
        """
        del task_id
        if self.router is None:
            raise InternalError(f"{self.path} has no router")
        return self.dense_gates(*self.router(x))

    def dense_gates(self, group: Tensor, weights: Tensor) -> Tensor:
        """Return the gates [routes, groups * experts] of a group [routes] and its weights."""
        gates = weights.new_zeros(len(group), *self.cores.shape[:2])
        gates[torch.arange(len(group)), group] = weights
        return gates.flatten(1)
