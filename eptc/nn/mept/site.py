"""One prompt site: experts, their router, and what they become for a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PromptSite"]


class PromptSite(nn.Module):
    """Prompts [batch, n, d] for one vector a row.

        p = softmax(q W^T);  v, e = the top_k largest of p, not normalised again
        P[b] = sum_j v[b, j] E[e[b, j]] + shared

    With one expert a row the original code adds up the experts that *all* rows chose, each row
    weighted by its own v. A `coupled` site does so, another gives each row what it gets alone.

    Args:
        experts: E [experts, n * d].
        router: W [experts, d].
        shared: prompts that every row gets [n, d], or None.
        norm: weight of the RMS norm that the router's input passes [d].
        length: n.
        top_k: how many experts are mixed.
        stochastic: the mean of all experts instead, whatever the router says.
        coupled: whether rows are mixed as above.
    """

    def __init__(
        self,
        experts: Tensor,
        router: Tensor,
        shared: Tensor | None,
        norm: Tensor,
        *,
        length: int,
        top_k: int,
        stochastic: bool,
        coupled: bool,
    ) -> None:
        super().__init__()
        self.experts = nn.Parameter(experts, requires_grad=False)
        self.router = nn.Parameter(router, requires_grad=False)
        self.shared = None if shared is None else nn.Parameter(shared, requires_grad=False)
        self.norm = nn.Parameter(norm, requires_grad=False)
        self.length = length
        self.top_k = top_k
        self.stochastic = stochastic
        self.coupled = coupled

    def probabilities(self, query: Tensor) -> Tensor:
        """Return p [batch, experts] of the vectors [batch, d]."""
        return torch.softmax(query @ self.router.T, dim=-1)

    def normed(self, hidden: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean(x^2) + eps) * norm, along the last axis."""
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return hidden / torch.sqrt(variance + eps) * self.norm

    def forward(self, query: Tensor) -> Tensor:
        """Return the prompts [batch, n, d] of the vectors [batch, d]."""
        prompts = self._mixed(query)
        return prompts if self.shared is None else prompts + self.shared

    def _mixed(self, query: Tensor) -> Tensor:
        experts = self.experts.reshape(len(self.router), self.length, -1)
        if self.stochastic:
            return experts.mean(0).expand(len(query), -1, -1)
        values, chosen = self.probabilities(query).topk(self.top_k, dim=-1)
        if self.coupled and self.top_k == 1:
            return values.unsqueeze(-1) * experts[chosen[:, 0]].sum(0)
        return torch.einsum("bk,bknd->bnd", values, experts[chosen])
