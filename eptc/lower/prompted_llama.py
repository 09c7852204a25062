"""The graph of a Llama classifier with prompts before the text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers.models.llama.modeling_llama import rotate_half

from eptc.ir.prompts import PromptLayout
from eptc.lower.attention import attend, causal_mask, split_heads
from eptc.lower.graph_spec import GraphSpec, Port, ids
from eptc.lower.prompt_site import ConstantPrefix, ConstantPrompts, PromptSite

__all__ = ["graphs", "install"]

# The original code's own, whatever `rms_norm_eps` says.
_EPS = 1e-6


def install(model: Any, layout: PromptLayout) -> None:
    """Give a LlamaForSequenceClassification its prompt sites, in place.

    What nothing reads has no site. A layer whose successor replaces the prompts computes them
    only as keys and values; the last computes nothing but the last position.
    """
    stack, config = model.model, model.config
    if not (layout.constant and 0 in layout.layers):
        # Where layer 0 replaces its prompts, they are still part of what that router reads.
        stack.prompts = _site(layout, config)
    replaced = 0 in layout.layers  # Whether the next layer replaces its prompts unseen.
    for number, layer in enumerate(stack.layers):
        layer.keeps_last = number == len(stack.layers) - 1
        layer.replaces_prompts = number in layout.layers
        layer.drops_prompts = layer.keeps_last or number + 1 in layout.layers
        # Whether the rows that arrive have prompts in front.
        layer.finds_prompts = not replaced
        replaced = layer.drops_prompts
        if layer.replaces_prompts:
            attention = layer.self_attn
            groups = config.num_key_value_heads
            layer.prompts = (
                ConstantPrefix(layout, groups, attention.head_dim)
                if layout.constant and layer.drops_prompts
                else _site(layout, config)
            )
        layer.forward = functools.partial(_layer, layer)
    model.prompt_layout = layout


def _site(layout: PromptLayout, config: Any) -> torch.nn.Module:
    if layout.constant:
        return ConstantPrompts(layout, config.hidden_size)
    return PromptSite(layout, config.hidden_size, normed=True, eps=_EPS)


def graphs(model: Any) -> dict[str, GraphSpec]:
    """Return the graph `model`: ids and mask [batch, sequence] -> logits [batch, labels].

    The logits are those of the last position, padding or not.
    """
    logits = Port("logits", ("batch", model.config.num_labels))
    inputs = (ids("input_ids"), ids("attention_mask"))
    return {"model": GraphSpec(_Classifier(model), inputs, (logits,))}


@dataclasses.dataclass(frozen=True)
class _Positions:
    """What a layer knows of all positions, n + sequence of them.

    Args:
        cos: of the rotary embedding [1, positions, d].
        sin: of the rotary embedding [1, positions, d].
        mask: what to add to the scores [batch, 1, positions, positions].
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor

    def rotated(self, heads: torch.Tensor, start: int | None) -> torch.Tensor:
        """Return heads [batch, heads, rows, d] at the positions from `start` on."""
        cos, sin = self.cos[:, start:].unsqueeze(1), self.sin[:, start:].unsqueeze(1)
        rotated: torch.Tensor = heads * cos + rotate_half(heads) * sin
        return rotated


class _Classifier(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        stack, layout = self.model.model, self.model.prompt_layout
        batch, length = input_ids.shape
        rows = stack.embed_tokens(input_ids)
        total = length + layout.length
        cos, sin = stack.rotary_emb(rows, torch.arange(total).unsqueeze(0))
        ones = torch.ones(batch, layout.length, dtype=torch.int64)
        mask = causal_mask(total, 0, torch.cat([ones, attention_mask], dim=1))
        positions, prompts = _Positions(cos, sin, mask), None
        if hasattr(stack, "prompts"):
            prompts = stack.prompts(length, rows)
            if 0 not in layout.layers:
                rows = torch.cat([prompts, rows], dim=1)
        for number, layer in enumerate(stack.layers):
            rows = layer(rows, positions, layout.length, prompts if number == 0 else None)
        logits: torch.Tensor = self.model.score(stack.norm(rows))[:, 0]
        return logits


def _layer(
    layer: Any,
    rows: torch.Tensor,
    positions: _Positions,
    length: int,
    replaced: torch.Tensor | None,
) -> torch.Tensor:
    """Compute a layer.

    Args:
        layer: the layer.
        rows: what arrives [batch, n + sequence, d], or [batch, sequence, d] where the prompts
            were dropped before.
        positions: of all rows, prompts in front.
        length: n.
        replaced: the prompts that layer 0 replaces, which its router reads too.

    Returns:
        Of the rows those that are read: all, the text's, or the last one.
    """
    prompts: Any = None
    tokens, prefix = rows, None
    if layer.finds_prompts:
        prompts, tokens = rows[:, :length], rows[:, length:]
    if layer.replaces_prompts:
        if isinstance(layer.prompts, ConstantPrefix):
            prefix = layer.prompts
        else:
            read = (tokens,) if replaced is None else (replaced, tokens)
            prompts = layer.prompts(tokens.shape[1] + length, *read)
    start: int | None = length  # Where in all positions the first query is.
    if not layer.drops_prompts:
        tokens = torch.cat([prompts, tokens], dim=1) if layer.replaces_prompts else rows
        start = None
    attention, normed = layer.self_attn, layer.input_layernorm(tokens)
    every = normed
    if layer.drops_prompts and prefix is None:
        every = torch.cat([layer.input_layernorm(prompts), normed], dim=1)
    d = attention.head_dim
    keys, values = (split_heads(f(every), d) for f in (attention.k_proj, attention.v_proj))
    if prefix is not None:
        keys, values = prefix.before(positions.rotated(keys, length), values)
    else:
        keys = positions.rotated(keys, None)
    if layer.keeps_last:
        tokens, normed, start = tokens[:, -1:], normed[:, -1:], -1
    queries = positions.rotated(split_heads(attention.q_proj(normed), d), start)
    result, _ = attend(
        attention, queries, keys, values, positions.mask[:, :, start:], scaling=attention.scaling
    )
    hidden = tokens + attention.o_proj(result.reshape(*tokens.shape[:2], -1))
    output: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output
