"""DeBERTa's disentangled attention: content and relative positions, without copies per head."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

from eptc.errors import BaseModelError
from eptc.lower.attention import hidden

__all__ = ["use_disentangled"]

# Distances beyond which no bucket changes are looked for up to here.
_FARTHEST = 2**20


def use_disentangled(model: Any) -> None:
    """Let a DeBERTa-v2 task model attend with this file's `_attend`, in place.

    The modules are called as often and in the same order as by transformers: a router inside
    one of them sees what it was trained with. What all layers share (mask, positions) is made
    once, by the encoder.

    Raises:
        BaseModelError: buckets that the positions' range leaves undefined.
    """
    encoder = model.deberta.encoder
    attentions = [layer.attention.self for layer in encoder.layer]
    encoder.get_attention_mask = _mask
    encoder.get_rel_pos = lambda *_: None
    if encoder.relative_attention and attentions[0].pos_att_type:
        table = _rows_by_distance(attentions[0])
        heads = attentions[0].num_attention_heads
        encoder.get_rel_pos = lambda states, *_: _positions(states, heads, table)
    for attention in attentions:
        attention.forward = functools.partial(_attend, attention)


def _mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return what to add to the scores [batch, 1, queries, keys].

    A padded query sees nothing, so everything alike: the first token may be padding.
    """
    seen = attention_mask.to(torch.bool)
    return hidden(seen.unsqueeze(1).unsqueeze(2) & seen.unsqueeze(1).unsqueeze(3))


def _rows_by_distance(attention: Any) -> torch.Tensor:
    """Return the row of the position table for the distances -d .. d [2 d + 1].

    Beyond d the row does not change any more. A table is exact where a logarithm, which each
    runtime rounds in its own way, falls on a bucket's edge.
    """
    span, buckets = attention.pos_ebd_size, attention.position_buckets
    # A single bucket has no half for each direction.
    farthest = span if buckets != 1 else _FARTHEST + 1
    while farthest <= _FARTHEST:
        rows = torch.arange(-farthest, farthest + 1)
        if buckets > 0:
            reach = attention.max_relative_positions
            rows = deberta.make_log_bucket_position(rows, buckets, reach).to(torch.int64)
        rows = torch.clamp(rows + span, 0, 2 * span - 1)
        if rows[0] == 0 and rows[-1] == 2 * span - 1 and bool((rows.diff() >= 0).all()):
            return rows
        farthest *= 2
    raise BaseModelError(
        f"the base has {buckets} position buckets for "
        f"{attention.max_relative_positions} relative positions: distances have no order in them",
        expected="fewer buckets than positions",
    )


def _positions(states: torch.Tensor, heads: int, table: torch.Tensor) -> torch.Tensor:
    """Return the table's row for each query and key [batch, heads, queries, keys].

    Repeated for batch and heads: ONNX's GatherElements does not broadcast its index.
    """
    batch, length = states.shape[0], states.shape[1]
    farthest = table.shape[0] // 2
    token = torch.arange(length)
    distance = (token.unsqueeze(1) - token).clamp(-farthest, farthest)
    rows = table[distance + farthest]
    return rows.expand(batch, heads, length, length)


def _attend(
    attention: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    output_attentions: bool = False,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
    rel_embeddings: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Attend with states [batch, sequence, d] to themselves, in the place of the module's own.

        score[i, j] = (q_i k_j + q_i pk[row(i - j)] + k_j pq[row(i - j)]) / sqrt(parts * d_head)

    Args:
        attention: the module.
        hidden_states: [batch, sequence, d].
        attention_mask: of `_mask`.
        output_attentions: not supported; the skeleton's configuration turns it off.
        query_states: never given by a sequence classifier.
        relative_pos: of `_positions`; None where positions play no part.
        rel_embeddings: the position table [rows, d].

    Returns:
        The result [batch, sequence, d], and None in the place of the weights.
    """
    del output_attentions, query_states
    kinds = attention.pos_att_type
    query = _split(attention, attention.query_proj(hidden_states)).transpose(1, 2)
    key = _split(attention, attention.key_proj(hidden_states)).permute(0, 2, 3, 1)
    value = _split(attention, attention.value_proj(hidden_states)).transpose(1, 2)
    parts = 1 + ("c2p" in kinds) + ("p2c" in kinds)
    scale = (parts * query.shape[-1]) ** -0.5
    query = query * scale
    scores = torch.matmul(query, key)
    if relative_pos is not None and rel_embeddings is not None:
        pos_query, pos_key = _project(attention, rel_embeddings.unsqueeze(0))
        if pos_key is not None:
            to_position = torch.matmul(query, pos_key.permute(0, 2, 3, 1))
            scores = scores + torch.gather(to_position, -1, relative_pos)
        if pos_query is not None:
            from_position = torch.matmul(pos_query.transpose(1, 2) * scale, key)
            scores = scores + torch.gather(from_position, -2, relative_pos)
    weights = torch.softmax(scores + attention_mask, dim=-1)
    result = torch.matmul(weights, value).transpose(1, 2)
    return result.reshape(*result.shape[:2], attention.all_head_size), None


def _project(
    attention: Any, table: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return queries and keys of the position table [1, rows, d]: [1, rows, heads, d_head]."""
    kinds = attention.pos_att_type
    if attention.share_att_key:
        query, key = attention.query_proj(table), attention.key_proj(table)
    else:
        key = attention.pos_key_proj(table) if "c2p" in kinds else None
        query = attention.pos_query_proj(table) if "p2c" in kinds else None
    return (
        _split(attention, query) if "p2c" in kinds else None,
        _split(attention, key) if "c2p" in kinds else None,
    )


def _split(attention: Any, states: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, heads * d_head] -> [batch, sequence, heads, d_head]."""
    heads, width = attention.num_attention_heads, attention.attention_head_size
    return states.reshape(*states.shape[:2], heads, width)
