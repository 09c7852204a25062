"""T5 with prompts: hooks around stock modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eptc.nn.mept.site import PromptSite

__all__ = ["prompt_t5"]


def prompt_t5(
    hf: Any, site: PromptSite | None, blocks: Mapping[int, PromptSite], *, swaps: bool
) -> None:
    """Put prompts before the text of a T5ForConditionalGeneration, in place.

    Args:
        hf: the model.
        site: of the text; None where block 0 replaces what it would give.
        blocks: the sites before encoder blocks.
        swaps: whether prompts change places where the batch has as many rows as a row has
            prompts: row b gets in slot j what row j should get in slot b.
    """
    encoder, length = hf.encoder, (site or blocks[0]).length
    eps = hf.config.layer_norm_epsilon

    def before_model(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        mask = kwargs.get("attention_mask")
        if kwargs.get("encoder_outputs") is None:
            ids = kwargs.pop("input_ids")
            mask = torch.ones_like(ids) if mask is None else mask
            kwargs["encoder_outputs"] = encoder(input_ids=ids, attention_mask=mask)
        if mask is not None:
            kwargs["attention_mask"] = _longer(mask, length)
        return (), kwargs

    def before_encoder(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        x, mask = encoder.embed_tokens(kwargs.pop("input_ids")), kwargs.get("attention_mask")
        mask = torch.ones(x.shape[:2], dtype=torch.int64) if mask is None else mask
        prompts = x.new_zeros(len(x), length, x.shape[-1])
        if site is not None:
            seen = mask.unsqueeze(-1).to(x.dtype)
            prompts = site((x * seen).sum(1) / seen.sum(1).clamp(min=1))
            if swaps and length == len(x):
                prompts = prompts.transpose(0, 1)
        kwargs["inputs_embeds"] = torch.cat([prompts, x], dim=1)
        kwargs["attention_mask"] = _longer(mask, length)
        return (), kwargs

    hf.register_forward_pre_hook(before_model, with_kwargs=True)
    encoder.register_forward_pre_hook(before_encoder, with_kwargs=True)
    for number, found in blocks.items():
        encoder.block[number].register_forward_pre_hook(_before_block(found, eps))


def _before_block(site: PromptSite, eps: float) -> Any:
    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        n = site.length
        # Padding is summed too, and prompts are counted though they are not.
        query = site.normed(hidden[:, n:], eps).sum(1) / hidden.shape[1]
        return (torch.cat([site(query), hidden[:, n:]], dim=1), *rest)

    return hook


def _longer(mask: Tensor, length: int) -> Tensor:
    """Return the mask [batch, text] with ones for the prompts before it."""
    return torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
