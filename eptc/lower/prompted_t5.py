"""The graphs of a T5 whose encoder has prompts before the text."""

from __future__ import annotations

import functools
from typing import Any

import torch

from eptc.ir.prompts import PromptLayout
from eptc.lower import encoder_decoder
from eptc.lower.attention import attend, padding_mask, split_heads
from eptc.lower.graph_spec import GraphSpec
from eptc.lower.prompt_site import ConstantPrefix, ConstantPrompts, PromptSite, swapped

__all__ = ["graphs", "install"]


def install(model: Any, layout: PromptLayout) -> None:
    """Give a T5ForConditionalGeneration its prompt sites, in place.

    What nothing reads has no site: the text's where block 0 replaces its prompts. A block whose
    successor replaces the prompts computes them only as keys and values.
    """
    encoder, config = model.encoder, model.config
    if 0 not in layout.layers:
        encoder.prompts = _site(layout, config, normed=False)
    replaced = 0 in layout.layers  # Whether the next block replaces its prompts unseen.
    for number, block in enumerate(encoder.block):
        block.replaces_prompts = number in layout.layers
        block.drops_prompts = number + 1 in layout.layers
        # Whether the rows that arrive have prompts in front.
        block.finds_prompts = not replaced
        replaced = block.drops_prompts
        if block.replaces_prompts:
            block.prompts = (
                ConstantPrefix(layout, config.num_heads, config.d_kv)
                if layout.constant and replaced
                else _site(layout, config, normed=True)
            )
        if block.replaces_prompts or replaced:
            block.forward = functools.partial(_block, block, layout.length)
    model.prompt_layout = layout


def _site(layout: PromptLayout, config: Any, *, normed: bool) -> torch.nn.Module:
    if layout.constant:
        return ConstantPrompts(layout, config.d_model)
    return PromptSite(layout, config.d_model, normed=normed, eps=config.layer_norm_epsilon)


def graphs(model: Any) -> dict[str, GraphSpec]:
    """Return the graphs `encoder` and `decoder`, as of a T5 without prompts.

    last_hidden_state and the keys and values that the decoder attends to have n rows more than
    the text, in front. `encoder_attention_mask` may be the text's: what it lacks are ones.
    """
    return encoder_decoder.graphs(model, _encode, rows="encoder_sequence")


def _encode(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    encoder, layout = model.encoder, model.prompt_layout
    batch, length = input_ids.shape
    rows = encoder.embed_tokens(input_ids)
    if 0 not in layout.layers:
        rows = torch.cat([_first_prompts(encoder, layout, rows, attention_mask), rows], dim=1)
    ones = torch.ones(batch, layout.length, dtype=torch.int64)
    mask = padding_mask(torch.cat([ones, attention_mask], dim=1))
    total = length + layout.length
    bias = encoder.block[0].layer[0].SelfAttention.compute_bias(total, total)
    for block in encoder.block:
        rows = block(rows, mask, bias)[0]
    hidden: torch.Tensor = encoder.final_layer_norm(rows)
    return hidden


def _first_prompts(
    encoder: Any, layout: PromptLayout, text: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return the prompts [batch, n, d] of the text's mean, padding left out."""
    seen = attention_mask.to(torch.float32)
    count = seen.sum(1, keepdim=True).clamp(min=1.0)
    prompts: torch.Tensor = encoder.prompts(count, text, scales=seen)
    return swapped(prompts) if layout.coupled and layout.length > 1 else prompts


def _block(
    block: Any, length: int, rows: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor]:
    """Compute an encoder block that replaces the prompts, or whose successor does.

    Args:
        block: the block.
        length: n.
        rows: what arrives [batch, n + sequence, d], or [batch, sequence, d] where the block
            before it dropped the prompts.
        mask: what to add to the scores [batch, 1, 1, n + sequence].
        bias: of positions [1, heads, n + sequence, n + sequence].

    Returns:
        [batch, n + sequence, d], or [batch, sequence, d] where the next block would replace
        the prompts unseen.
    """
    prompts: Any = None
    tokens, prefix = rows, None
    if block.finds_prompts:
        prompts, tokens = rows[:, :length], rows[:, length:]
    if block.replaces_prompts:
        if isinstance(block.prompts, ConstantPrefix):
            prefix = block.prompts
        else:
            prompts = block.prompts(tokens.shape[1] + length, tokens)
    if not block.drops_prompts:
        stock = type(block).forward
        return (stock(block, torch.cat([prompts, tokens], dim=1), mask, bias)[0],)
    layer, attention = block.layer[0], block.layer[0].SelfAttention
    normed = layer.layer_norm(tokens)
    every = normed
    if prefix is None:
        every = torch.cat([layer.layer_norm(prompts), normed], dim=1)
    d = attention.key_value_proj_dim
    queries = split_heads(attention.q(normed), d)
    keys, values = (split_heads(linear(every), d) for linear in (attention.k, attention.v))
    if prefix is not None:
        keys, values = prefix.before(keys, values)
    result, _ = attend(
        attention, queries, keys, values, mask, scaling=1.0, position_bias=bias[:, :, length:]
    )
    hidden = tokens + attention.o(result.reshape(*tokens.shape[:2], attention.inner_dim))
    return (block.layer[-1](hidden),)
