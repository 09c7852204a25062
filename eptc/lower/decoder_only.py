"""The graph of a decoder with its cache as inputs and outputs: Llama."""

from __future__ import annotations

from typing import Any

import torch

from eptc.lower.attention import causal_mask
from eptc.lower.graph_spec import GraphSpec, Port, ids
from eptc.lower.kv_cache import cache, flatten

__all__ = ["graphs"]


def graphs(model: Any) -> dict[str, GraphSpec]:
    """Return the graph `model`, for the first and for later steps (the past may be empty).

    ids [batch, sequence], mask [batch, total_sequence] and the past keys and values
    [batch, groups, past_sequence, d] -> logits [batch, sequence, vocabulary], present ones.
    """
    config = model.config
    head = model.model.layers[0].self_attn.head_dim
    inputs = [ids("input_ids"), ids("attention_mask", "total_sequence"), ids("position_ids")]
    outputs = [Port("logits", ("batch", "sequence", config.vocab_size))]
    for layer in range(config.num_hidden_layers):
        for what in ("key", "value"):
            past = ("batch", config.num_key_value_heads, "past_sequence", head)
            present = ("batch", config.num_key_value_heads, "total_sequence", head)
            inputs.append(Port(f"past_key_values.{layer}.{what}", past))
            outputs.append(Port(f"present.{layer}.{what}", present))
    return {"model": GraphSpec(_Decoder(model), tuple(inputs), tuple(outputs))}


class _Decoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        kept = cache(past)
        mask = causal_mask(input_ids.shape[1], past[0].shape[2], attention_mask)
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=kept,
            use_cache=True,
        )
        return (output.logits, *flatten(kept))
