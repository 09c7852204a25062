"""The graphs of T5: an encoder that also makes the cross-attention cache, and one decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from eptc.lower.attention import causal_mask, padding_mask, split_heads
from eptc.lower.graph_spec import GraphSpec, Port, ids
from eptc.lower.kv_cache import cache, flatten
from eptc.lower.relative_position import use_table

__all__ = ["Encode", "graphs"]

# The model, ids and mask [batch, sequence] -> the encoder's output [batch, rows, d_model].
Encode = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def _stock(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    mask = padding_mask(attention_mask)
    hidden: torch.Tensor = model.encoder(input_ids=input_ids, attention_mask=mask)[0]
    return hidden


def graphs(model: Any, encode: Encode = _stock, *, rows: str = "sequence") -> dict[str, GraphSpec]:
    """Return the graphs `encoder` and `decoder`.

    encoder: ids and mask [batch, sequence] -> last_hidden_state [batch, rows, d_model] and
    the keys and values [batch, heads, rows, d_kv] that every decoder layer attends to.
    decoder: ids [batch, sequence], the encoder's mask and both caches -> logits and the
    decoder's own cache; the past may be empty.

    Args:
        model: T5ForConditionalGeneration.
        encode: what the encoder computes.
        rows: the size of its output, where that is not `sequence`. Then the decoder's mask may
            be shorter: what it lacks in front are ones.
    """
    for module in model.modules():
        if hasattr(module, "EncDecAttention"):
            # transformers adds zeros [1, heads, queries, keys] here, in every layer.
            module.EncDecAttention.without_position_bias = True
            module.EncDecAttention.split_heads = _SplitHeads(module.EncDecAttention.n_heads)
        if getattr(module, "has_relative_attention_bias", False):
            use_table(module)
    decoder = _decoder(model, longer_mask=rows != "sequence")
    return {"encoder": _encoder(model, encode, rows), "decoder": decoder}


def _cache_ports(config: Any, name: str, keys: str, what: str) -> list[Port]:
    """Return the key and value ports of each decoder layer, in order."""
    shape = ("batch", config.num_heads, keys, config.d_kv)
    return [
        Port(f"{name}.{layer}.{what}.{part}", shape)
        for layer in range(config.num_decoder_layers)
        for part in ("key", "value")
    ]


def _encoder(model: Any, encode: Encode, rows: str) -> GraphSpec:
    hidden = Port("last_hidden_state", ("batch", rows, model.config.d_model))
    present = _cache_ports(model.config, "present", rows, "encoder")
    inputs = (ids("input_ids"), ids("attention_mask"))
    return GraphSpec(_Encoder(model, encode), inputs, (hidden, *present))


def _decoder(model: Any, *, longer_mask: bool) -> GraphSpec:
    config = model.config
    own = _cache_ports(config, "past_key_values", "past_sequence", "decoder")
    cross = _cache_ports(config, "past_key_values", "encoder_sequence", "encoder")
    past = [port for i in range(0, len(own), 2) for port in (*own[i : i + 2], *cross[i : i + 2])]
    mask = ids("encoder_attention_mask", "mask_sequence" if longer_mask else "encoder_sequence")
    inputs = (ids("input_ids"), mask, *past)
    logits = Port("logits", ("batch", "sequence", config.vocab_size))
    present = _cache_ports(config, "present", "total_sequence", "decoder")
    return GraphSpec(_Decoder(model, longer_mask=longer_mask), inputs, (logits, *present))


class _SplitHeads(torch.nn.Module):
    """[batch, keys, heads * d] -> [batch, heads, keys, d].

    A module, so that its nodes know which block they belong to.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, joined: torch.Tensor) -> torch.Tensor:
        return split_heads(joined, joined.shape[2] // self.heads)


class _Encoder(torch.nn.Module):
    def __init__(self, model: Any, encode: Encode) -> None:
        super().__init__()
        self.model = model
        self.encode = encode

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        hidden = self.encode(self.model, input_ids, attention_mask)
        outputs = [hidden]
        for block in self.model.decoder.block:
            attention = block.layer[1].EncDecAttention
            for linear in (attention.k, attention.v):
                present = attention.split_heads(linear(hidden))
                outputs.append(present)
        return tuple(outputs)


class _Decoder(torch.nn.Module):
    def __init__(self, model: Any, *, longer_mask: bool) -> None:
        super().__init__()
        self.model = model
        self.longer_mask = longer_mask

    def forward(
        self, input_ids: torch.Tensor, encoder_attention_mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        config = self.model.config
        own = cache([tensor for i in range(0, len(past), 4) for tensor in past[i : i + 2]])
        cross = cache([tensor for i in range(2, len(past), 4) for tensor in past[i : i + 2]])
        both = EncoderDecoderCache(own, cross)
        for layer in range(config.num_decoder_layers):
            both.is_updated[layer] = True
        mask = padding_mask(encoder_attention_mask)
        if self.longer_mask:
            # Nothing is added to the scores of the keys in front.
            lacking = past[2].shape[2] - encoder_attention_mask.shape[1]
            mask = torch.nn.functional.pad(mask, (lacking, 0))
        # The cached keys and values stand for it: only its presence is asked for.
        hidden = torch.zeros(*encoder_attention_mask.shape, config.d_model)
        output = self.model.decoder(
            input_ids=input_ids,
            attention_mask=causal_mask(input_ids.shape[1], past[0].shape[2]),
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            past_key_values=both,
            use_cache=True,
        ).last_hidden_state
        if config.scale_decoder_outputs:
            output = output * (config.d_model**-0.5)
        return (self.model.lm_head(output), *flatten(own))
