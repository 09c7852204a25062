"""Attention as the graphs compute it: eager, without copies that only broadcast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "attend", "causal_mask", "hidden", "padding_mask", "split_heads", "traced_attention",
]  # fmt: skip

_NAME = "eptc-traced"
_MASKED = torch.finfo(torch.float32).min


@contextlib.contextmanager
def traced_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let the modules of `model` attend with `attend` while it is traced."""
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if config is not None:
                config._attn_implementation = _NAME
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def padding_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return what to add to the scores [batch, 1, 1, keys]: 0 where the mask is 1.

    Args:
        attention_mask: 1 where a key is seen, else 0 [batch, keys].
    """
    return hidden(_visible(attention_mask))


def hidden(visible: torch.Tensor) -> torch.Tensor:
    """Return what to add to scores: 0 where a key is visible, else the least float32."""
    return torch.where(visible, 0.0, _MASKED)


def _visible(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mask [batch, keys] as booleans [batch, 1, 1, keys]."""
    # Indexing with None would add a Slice of everything for each remaining axis.
    return attention_mask.unsqueeze(1).unsqueeze(1).to(torch.bool)


def causal_mask(
    queries: int, past: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what to add to the scores [batch or 1, 1, queries, past + queries].

    Query i sees the keys up to past + i; where `attention_mask` [batch, past + queries] is
    given, only those it marks with 1.
    """
    query = torch.arange(queries).unsqueeze(1) + past
    allowed = (torch.arange(past + queries) <= query).unsqueeze(0).unsqueeze(0)
    if attention_mask is not None:
        allowed = allowed & _visible(attention_mask)
    return hidden(allowed)


def split_heads(joined: torch.Tensor, width: int) -> torch.Tensor:
    """[batch, rows, heads * width] -> [batch, heads, rows, width]."""
    batch, rows, total = joined.shape
    return joined.reshape(batch, rows, total // width, width).transpose(1, 2)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with query [batch, heads, queries, d] to key and value [batch, groups, keys, d].

    Where fewer key-value groups than heads exist, the heads of a group are stacked along the
    queries, so that keys and values are never repeated in memory.

    Returns:
        The result [batch, queries, heads, d], and None in the place of the weights.
    """
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    if scaling is None:
        scaling = width**-0.5
    if groups != heads:
        query = query.reshape(batch, groups, heads // groups * queries, width)
    scores = torch.matmul(query, key.transpose(2, 3))
    if scaling != 1.0:
        scores = scores * scaling
    if groups != heads:
        scores = scores.reshape(batch, heads, queries, key.shape[2])
    bias = _bias(module, attention_mask, position_bias)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    if groups != heads:
        weights = weights.reshape(batch, groups, heads // groups * queries, key.shape[2])
    result = torch.matmul(weights, value)
    if groups != heads:
        result = result.reshape(batch, heads, queries, width)
    return result.transpose(1, 2), None


def _bias(
    module: torch.nn.Module, mask: torch.Tensor | None, position_bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Sum mask and position bias: the same sum in every layer, so it is computed once."""
    if position_bias is None or getattr(module, "without_position_bias", False):
        return mask
    return position_bias if mask is None else position_bias + mask
