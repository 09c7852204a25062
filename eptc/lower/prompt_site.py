"""Prompt sites of a traced model: what a router mixes for each row, or a constant."""

from __future__ import annotations

import functools

import torch

from eptc.ir.prompts import PromptLayout

__all__ = ["ConstantPrefix", "ConstantPrompts", "PromptSite", "Prompts", "swapped"]


class PromptSite(torch.nn.Module):
    """Prompts [batch, n, d] that a router mixes for the mean of each row's vectors.

    No shape depends on data: what the router leaves out has the weight 0.

    Args:
        layout: sizes and modes.
        width: d.
        normed: whether the router's input passes an RMS norm.
        eps: its epsilon.
    """

    def __init__(self, layout: PromptLayout, width: int, *, normed: bool, eps: float) -> None:
        super().__init__()
        self.length, self.width = layout.length, width
        self.top_k, self.num_experts = layout.top_k, layout.experts
        self.mixes_rows = layout.coupled and layout.top_k == 1
        self.eps = eps
        self.experts = _parameter(layout.experts, layout.length * width)
        self.router = _parameter(layout.experts, width)
        self.shared = _parameter(layout.length, width) if layout.shared else None
        self.norm = _parameter(width) if normed else None

    def _summed(self, rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the rows [batch, rows, d], scaled or normed, [batch, d].

        They are multiplied by their scales and added up in one product, so that no copy of
        them is made.
        """
        if self.norm is None:
            assert scales is not None
            return torch.matmul(scales.unsqueeze(1), rows).squeeze(1)
        variance = (rows * rows).mean(-1, keepdim=True)
        inverse = torch.reciprocal(torch.sqrt(variance + self.eps))
        return torch.matmul(inverse.transpose(1, 2), rows).squeeze(1) * self.norm

    def forward(
        self,
        count: int | torch.Tensor,
        *parts: torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the prompts.

        Args:
            count: what the sums are divided by.
            parts: vectors whose sum the router reads, each [batch, rows, d].
            scales: of the rows [batch, rows], where they pass no norm.
        """
        query = functools.reduce(torch.add, [self._summed(rows, scales) for rows in parts]) / count
        p = torch.softmax(torch.matmul(query, self.router.t()), dim=-1)
        if self.mixes_rows:
            values, chosen = p.topk(1, dim=-1)
            counts = torch.zeros_like(p).scatter(-1, chosen, 1.0).sum(0, keepdim=True)
            mixed = values * torch.matmul(counts, self.experts)
        else:
            if self.top_k < self.num_experts:
                values, chosen = p.topk(self.top_k, dim=-1)
                p = torch.zeros_like(p).scatter(-1, chosen, values)
            mixed = torch.matmul(p, self.experts)
        prompts = mixed.reshape(query.shape[0], self.length, self.width)
        return prompts if self.shared is None else prompts + self.shared


class ConstantPrompts(torch.nn.Module):
    """The same prompts for every row; only how many rows there are is looked at."""

    def __init__(self, layout: PromptLayout, width: int) -> None:
        super().__init__()
        self.length = layout.length
        self.rows = _parameter(layout.length, width)

    def forward(
        self,
        count: int | torch.Tensor,  # noqa: ARG002  # as of a site
        *parts: torch.Tensor,
        scales: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """Return the prompts [batch, n, d]."""
        return self.rows.unsqueeze(0).expand(parts[0].shape[0], -1, -1)


class ConstantPrefix(torch.nn.Module):
    """The keys and values of prompts that nothing else is left of.

    Args:
        layout: sizes.
        groups: key-value heads.
        width: of a head.
    """

    def __init__(self, layout: PromptLayout, groups: int, width: int) -> None:
        super().__init__()
        self.length = layout.length
        self.key = _parameter(groups, layout.length, width)
        self.value = _parameter(groups, layout.length, width)

    def before(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [batch, groups, n + tokens, d] with the prompts' in front."""
        shape = (keys.shape[0], -1, -1, -1)
        return (
            torch.cat([self.key.unsqueeze(0).expand(shape), keys], dim=2),
            torch.cat([self.value.unsqueeze(0).expand(shape), values], dim=2),
        )


Prompts = PromptSite | ConstantPrompts


def swapped(prompts: torch.Tensor) -> torch.Tensor:
    """Swap rows and slots of prompts [batch, n, d] where the batch has n rows.

    Which row of [batch * n, d] goes where is computed from the size of the batch, so one graph
    serves every batch and no row is computed twice.
    """
    batch, length, width = prompts.shape
    rows, slots = torch.arange(batch).unsqueeze(1), torch.arange(length).unsqueeze(0)
    plain, square = rows * length + slots, slots * length + rows
    found = torch.where(torch.scalar_tensor(batch) == length, square, plain)
    return torch.nn.functional.embedding(found, prompts.reshape(batch * length, width))


def _parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape))
