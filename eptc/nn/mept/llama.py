"""A Llama classifier with prompts: a forward of its own, and hooks around stock layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from eptc.nn.mept.site import PromptSite

__all__ = ["prompt_llama"]

# The original code's own, whatever `rms_norm_eps` says.
_EPS = 1e-6


def prompt_llama(hf: Any, site: PromptSite, blocks: Mapping[int, PromptSite]) -> None:
    """Put prompts before the text of a LlamaForSequenceClassification, in place.

    It reads the last position of each row, padding or not, because it gets vectors, not ids.

    Args:
        hf: the model.
        site: of the text.
        blocks: the sites before layers.
    """

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = hf.model.embed_tokens(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = site(site.normed(x, _EPS).mean(1))
        ones = mask.new_ones(len(mask), site.length)
        hidden = hf.model(
            inputs_embeds=torch.cat([prompts, x], dim=1),
            attention_mask=torch.cat([ones, mask], dim=1),
        ).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=hf.score(hidden[:, -1]))

    hf.forward = forward
    for number, found in blocks.items():
        layer = hf.model.layers[number]
        layer.register_forward_pre_hook(_before_layer(found, with_prompts=number == 0))


def _before_layer(site: PromptSite, *, with_prompts: bool) -> Any:
    """Return the hook that replaces the prompts; its sum has the old ones in it or not."""

    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        n = site.length
        summed = hidden if with_prompts else hidden[:, n:]
        query = site.normed(summed, _EPS).sum(1) / hidden.shape[1]
        return (torch.cat([site(query), hidden[:, n:]], dim=1), *rest)

    return hook
