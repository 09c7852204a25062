"""TuckA's parts: experts between two shared bases, and a router by centroids."""

from __future__ import annotations

import dataclasses

import numpy as np

from eptc.ir.deltas import Delta, Rows
from eptc.ir.numbers import Float64, product, read, sigmoid
from eptc.ir.routing import InputRouter, Unit
from eptc.tensors import LazyTensor

__all__ = ["CentroidRouter", "Tucker"]


@dataclasses.dataclass(frozen=True, eq=False)
class Tucker(Delta):
    """An edit of a linear's input, seen at its output: D = (W U) core^T U^T.

    y = W (x + U core^T U^T x): the edit goes through the linear's own weight (specs: TuckA,
    closed forms). All experts of a linear share W and U.

    Args:
        basis: U [in, r].
        core: [r, r].
        weight: W [out, in].
    """

    basis: LazyTensor
    core: LazyTensor
    weight: LazyTensor

    @property
    def out_features(self) -> int:  # type: ignore[override]  # the weight's
        """Rows of D."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:  # type: ignore[override]  # the weight's
        """Columns of D."""
        return self.weight.shape[1]

    def factors(self) -> tuple[Float64, Float64]:
        """Return W U core^T [out, r] and U^T [r, in]."""
        u = read(self.basis)
        return np.asarray(read(self.weight) @ u @ read(self.core).T), u.T

    def reader(self) -> Rows:
        """Return what computes rows of D; of W in float64 no more than those."""
        u, weight = read(self.basis), self.weight.numpy()
        edit = product(u, read(self.core).T)

        def rows(start: int, stop: int) -> Float64:
            return product(product(weight[start:stop].astype(np.float64), edit), u.T)

        return rows

    @property
    def rank_bound(self) -> int:
        """r, or the smaller side of W."""
        return min(self.basis.shape[1], *self.weight.shape)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """U and the core; the weight is the base's."""
        return self.basis, self.core


@dataclasses.dataclass(frozen=True, eq=False)
class CentroidRouter(InputRouter):
    """Chooses the group of experts with the highest score, all of whose scores are its weights.

    With m the mean of the input, padding included, and l = E m seen as [groups, experts]:

        s = sigmoid(l / |l|), the norm over each group;  gates = s in the group of the largest s

    A group whose logits are all zero has no direction: its scores, and the answer, are NaN.

    Args:
        centroids: E [groups * experts, in].
        groups: how many groups.
        unit: `batch`: the mean over all rows; `row`: over each row's own positions.
        site: path of the linear whose input it reads.
    """

    centroids: LazyTensor
    groups: int
    unit: Unit
    site: str | None

    @property
    def num_experts(self) -> int:
        """How many experts all groups have."""
        return self.centroids.shape[0]

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """The centroids."""
        return (self.centroids,)

    def gates(self, x: Float64) -> Float64:
        """Return gates [1, 1, experts], or [batch, 1, experts] for rows, of x [batch, length, in].

        The same bits on every machine.
        """
        x = np.asarray(x, np.float64)
        if self.unit == "batch":
            x = x.reshape(1, -1, x.shape[-1])
        ones = np.full((1, x.shape[1]), 1.0)
        means = np.concatenate([product(ones, row) for row in x]) / x.shape[1]
        logits = product(means, read(self.centroids).T).reshape(len(x), self.groups, -1)
        squares = product((logits**2).reshape(-1, logits.shape[2]), np.ones((logits.shape[2], 1)))
        with np.errstate(invalid="ignore"):
            scores = sigmoid(logits / np.sqrt(squares).reshape(len(x), -1, 1))
        chosen = scores.max(axis=2).argmax(axis=1)
        others = np.arange(self.groups) != chosen[:, None]
        scores[others] *= 0.0  # what is NaN stays NaN
        return scores.reshape(len(x), 1, -1)
