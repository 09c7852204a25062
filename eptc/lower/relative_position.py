"""T5's relative position bias by distance instead of by formula."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["use_table"]


def use_table(attention: Any) -> None:
    """Let a T5 attention look its position bias up by distance.

    The bucket of a distance no longer changes beyond `relative_attention_max_distance`, so a
    table of the nearer ones holds them all. It is exact where a logarithm, which each runtime
    rounds in its own way, falls on a bucket's edge (distance 16 of T5's encoder, for one).
    """
    farthest = attention.relative_attention_max_distance
    if farthest <= attention.relative_attention_num_buckets:
        return  # No logarithmic part, or none that is well defined.
    buckets = attention._relative_position_bucket(
        torch.arange(-farthest, farthest + 1),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=farthest,
    )

    def compute_bias(
        queries: int, keys: int, device: object = None, past_seen_tokens: int = 0
    ) -> torch.Tensor:
        del device
        by_distance = attention.relative_attention_bias(buckets)
        query = torch.arange(queries).unsqueeze(1) + past_seen_tokens
        distance = (torch.arange(keys) - query).clamp(-farthest, farthest)
        bias = torch.nn.functional.embedding(distance + farthest, by_distance)
        return bias.permute(2, 0, 1).unsqueeze(0)

    attention.compute_bias = compute_bias
