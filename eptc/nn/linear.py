"""`EptLinear`: a linear with a routed branch of experts beside its weight."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.nn.adapted import AdaptedLinear, Undecided
from eptc.nn.config import EptConfig
from eptc.nn.experts import Experts, Factors, PaperExperts, ReleasedExperts
from eptc.nn.losses import contrastive_loss
from eptc.nn.routing import Route, Router, TaskRouter, TokenRouter

__all__ = ["EptLinear", "TaskContext", "fill_parameter"]


# Dimensions that a file may make larger than the linear needs, by part.
_SPARE_RELEASED = {"task_embedding": 0}
_SPARE_PAPER = {"task_embedding": 0, "A": 1, "B": 0}


@dataclasses.dataclass
class TaskContext:
    """What the adapted linears of one model know of the forward they are in.

    Args:
        task_id: the task; None outside a forward.
        wanted: paths of the linears whose contrastive loss is asked for.
        terms: where they leave it, by path.
        undecided: takes note of tokens' routes within rounding; None where nobody asks.
    """

    task_id: int | None = None
    wanted: frozenset[str] = frozenset()
    terms: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    undecided: Undecided | None = None

    @property
    def active(self) -> int:
        """The task's id.

        Raises:
            TaskError: no task is active.
        """
        if self.task_id is None:
            raise TaskError(
                "no task is active",
                fix='call the model with task="<name>", or inside `with model.task("<name>"):`',
            )
        return self.task_id

    @contextlib.contextmanager
    def recording(self, wanted: frozenset[str]) -> Iterator[None]:
        """Let some linears leave their contrastive losses until the context is left."""
        self.wanted = wanted
        try:
            yield
        finally:
            self.wanted, self.terms = frozenset(), {}


class EptLinear(AdaptedLinear):
    """y = W0 x + bias + scale * sum over the task's experts of gate * expert(x).

    Args:
        base: the linear that is adapted; it stays as it is.
        config: variant, sizes, ranks, gates and scales.
        path: the linear's full name in its model.
        context: which task is active; one object for all linears of a model.
        factors: A and B where they are shared; None: the linear's own.
        dropout: probability of dropping an element of the branch's input while training.
    """

    def __init__(
        self,
        base: nn.Linear,
        config: EptConfig,
        path: str,
        context: TaskContext,
        *,
        factors: Factors | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, path)
        self.config = config
        self.context = context
        self.experts = _experts(base, config, path, factors)
        kind = TaskRouter if config.gates.router_input == "task" else TokenRouter
        self.router: Router = kind(
            base.in_features,
            len(config.kernel_sizes),
            config.top_k,
            config.gates,
            bias=config.variant == "released",
        )
        self.task_embedding = nn.Parameter(torch.zeros(len(config.tasks), base.in_features))
        self.dropout = nn.Dropout(dropout)
        self.scaling = config.scaling_of(path)
        # Under d/T each expert has a factor of its own: its latent width.
        self.widths = tuple(
            math.ceil(min(base.in_features, base.out_features) / size)
            if config.scale.rule == "d/T"
            else 1
            for size in config.kernel_sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out] for x [..., in] under the active task.

        Raises:
            TaskError: no task is active.
        """
        y = self.base(x)
        if self.path in self.context.wanted:
            loss = contrastive_loss(x, self.task_embedding, self.context.active)
            self.context.terms[self.path] = loss
        if self.context.undecided is not None and isinstance(self.router, TokenRouter):
            self.context.undecided.note(self.router.close(x, self._embedding(None)))
        return cast("Tensor", (y + self.delta(x)).to(y.dtype))

    def delta(self, x: Tensor, task_id: int | None = None) -> Tensor:
        """Return the branch alone [..., out] for x [..., in].

        In the released code's order: each output times its gate, summed in the order of the
        experts, then times the scale (specs, forward).

        Args:
            x: the input, [..., in].
            task_id: the task; None: the active one.

        Raises:
            TaskError: no task is given and none is active.
        """
        gates, experts = self.router(x, self._embedding(task_id))
        return self._mix(self.dropout(x), gates, experts)

    @property
    def routed_experts(self) -> int:
        """How many experts a router that reads the input chooses from; 0 where none does."""
        return 0 if isinstance(self.router, TaskRouter) else len(self.experts.sizes)

    @torch.no_grad()
    def gates(self, x: Tensor, task_id: int | None = None) -> Tensor:
        """Return the gates [..., N] of an input x [..., in]; 0 for experts not chosen.

        Raises:
            TaskError: no task is given and none is active.
        """
        values = self.router(x, self._embedding(task_id)).values
        return cast("Tensor", values).expand(*x.shape[:-1], -1)

    @torch.no_grad()
    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return what the branch adds [..., out] for x [..., in] under given gates [..., N]."""
        return self._mix(x, gates, range(len(self.experts.sizes)))

    def _mix(self, x: Tensor, gates: Tensor, experts: Sequence[int]) -> Tensor:
        outputs = self.experts(x, experts)
        total: Tensor | None = None
        for expert, output in zip(experts, outputs, strict=True):
            term = output * (gates[..., expert, None] * self.widths[expert])
            total = term if total is None else total + term
        assert total is not None  # a router keeps one expert or more
        return total * self.scaling

    @torch.no_grad()
    def dense(self, task_id: int | None = None) -> Tensor:
        """Return the matrix [out, in] the branch stands for, from the experts' definitions."""
        route = self.route(task_id)
        total: Tensor | None = None
        for expert, weight in zip(route.experts, route.weights, strict=True):
            # In place: a matrix of its own for every term is what large models have no room for.
            term = self.experts.dense(expert).mul_(weight * self.widths[expert] * self.scaling)
            total = term if total is None else total.add_(term)
        assert total is not None  # a router keeps one expert or more
        return total

    def route(self, task_id: int | None = None) -> Route:
        """Return which experts a task uses (the active one where none is given).

        Raises:
            TaskError: no task is given and none is active.
            OptionError: the router reads more than the task.
        """
        if not isinstance(self.router, TaskRouter):
            raise OptionError(f"{self.path} has no route that depends on the task alone")
        return self.router.route(self._embedding(task_id))

    def _embedding(self, task_id: int | None) -> Tensor:
        return self.task_embedding[self.context.active if task_id is None else task_id]

    def parts(self) -> dict[str, nn.Parameter]:
        """Return the branch's parameters by their names in a native checkpoint."""
        kernels = {f"kernels.{i}": kernel for i, kernel in enumerate(self.experts.kernels)}
        parts = {"task_embedding": self.task_embedding, "router.weight": self.router.weight}
        if self.router.bias is not None:
            parts["router.bias"] = self.router.bias
        if self.config.sharing == "per-linear":
            parts |= {"A": self.experts.factors.A, "B": self.experts.factors.B}
        return {**parts, **kernels}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every parameter of the branch from tensors by their native names.

        Raises:
            CheckpointError: a tensor is missing, has no place, or has another shape.
        """
        parts = self.parts()
        for part in sorted(parts.keys() - tensors.keys()):
            raise CheckpointError(f"{self.path} has no {part}")
        for part in sorted(tensors.keys() - parts.keys()):
            raise CheckpointError(f"{self.path} has no place for {part}")
        spare = _SPARE_PAPER if self.config.variant == "paper" else _SPARE_RELEASED
        for part, tensor in tensors.items():
            fill_parameter(parts[part], tensor, f"{self.path}: {part}", spare.get(part))


def fill_parameter(
    parameter: nn.Parameter, tensor: Tensor, what: str, spare: int | None = None
) -> None:
    """Give a parameter another value.

    Args:
        parameter: the parameter.
        tensor: its value.
        what: its name in an error.
        spare: the dimension that may be larger than the parameter's; None: none may.

    Raises:
        CheckpointError: the tensor's shape does not fit.
    """
    wanted = list(parameter.shape)
    found = list(tensor.shape)
    fits = len(found) == len(wanted) and all(
        have == want or (i == spare and have > want)
        for i, (have, want) in enumerate(zip(found, wanted, strict=False))
    )
    if not fits:
        expected = " x ".join(
            f"{size}{' or more' if i == spare else ''}" for i, size in enumerate(wanted)
        )
        raise CheckpointError(f"{what} has the shape {found}", expected=expected)
    parameter.data = tensor.to(parameter.dtype).clone()


def _experts(base: nn.Linear, config: EptConfig, path: str, factors: Factors | None) -> Experts:
    sizes, rank = config.kernel_sizes, config.rank_of(path)
    shape = base.in_features, base.out_features
    if config.variant == "released":
        own = Factors(rank, *ReleasedExperts.factor_shape(*shape))
        return ReleasedExperts(own, sizes, *shape)
    if factors is None:
        factors = Factors(rank, *PaperExperts.factor_shape(*shape, sizes))
    return PaperExperts(factors, sizes, *shape)
