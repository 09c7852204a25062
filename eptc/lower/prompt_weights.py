"""The weights of a prompted task model: the sites' own, or what constant prompts become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from eptc.ir import Float64
from eptc.ir.numbers import read
from eptc.ir.prompts import PromptLayout, PromptSite, PromptTuning
from eptc.tensors import ComputedTensor, LazyTensor

__all__ = ["prompted_weights"]


def prompted_weights(
    config: Any, prompts: PromptTuning, layout: PromptLayout, weights: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the weights of a task model and of its prompts by canonical name; none is read.

    Constant prompts are computed in float64 and rounded once.

    Args:
        config: a transformers configuration.
        prompts: the sites.
        layout: what the model computes.
        weights: of the task model without prompts.
    """
    llama = prompts.model_type == "llama"
    places: dict[str, PromptSite] = {}
    if prompts.input is not None and not (layout.constant and 0 in layout.layers):
        places["model.prompts" if llama else "encoder.prompts"] = prompts.input
    stack, depth = "model.layers" if llama else "encoder.block", config.num_hidden_layers
    found = dict(weights)
    for number, site in prompts.blocks.items():
        path = f"{stack}.{number}"
        dropped = number + 1 in layout.layers or (llama and number + 1 == depth)
        if layout.constant and dropped:
            prefix = _LlamaPrefix if llama else _T5Prefix
            found |= dict(prefix(config, prompts, site, path, weights).tensors())
        else:
            places[f"{path}.prompts"] = site
    for path, site in places.items():
        found |= dict(_site(path, site, prompts, layout))
    return found


def _site(
    path: str, site: PromptSite, prompts: PromptTuning, layout: PromptLayout
) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors of a site's module."""
    width = site.experts.shape[1]
    if layout.constant:
        shape = (prompts.length, width)
        yield _computed(f"{path}.rows", shape, lambda: _constant_rows(prompts, site))
        return
    experts = site.experts
    flat = (layout.experts, layout.length * width)
    name = f"{path}.experts"
    yield (
        name,
        ComputedTensor(name, experts.dtype, flat, lambda: experts.numpy().reshape(flat)),
    )
    yield f"{path}.router", site.router
    if site.shared is not None:
        yield f"{path}.shared", site.shared
    if site.norm is not None:
        yield f"{path}.norm", site.norm


def _constant_rows(prompts: PromptTuning, site: PromptSite) -> Float64:
    """Return the prompts [n, d] that every row gets.

    The mean of the experts; of one expert that is the expert, whose probability is 1.
    """
    experts = read(site.experts)
    rows = experts.reshape(-1, prompts.length, experts.shape[1]).mean(axis=0)
    return rows if site.shared is None else rows + read(site.shared)


def _computed(
    name: str, shape: tuple[int, ...], compute: Callable[[], Float64]
) -> tuple[str, LazyTensor]:
    return name, ComputedTensor(name, "float64", shape, compute)


def _rms(x: Float64, weight: Float64, eps: float) -> Float64:
    normed: Float64 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
    return normed


class _Prefix:
    """Keys and values [groups, n, d] of constant prompts in one block.

    Args:
        config: a transformers configuration.
        prompts: the sites.
        site: that of the block.
        path: of the block.
        weights: of the task model.
    """

    norm: str
    projections: tuple[str, str]

    def __init__(
        self,
        config: Any,
        prompts: PromptTuning,
        site: PromptSite,
        path: str,
        weights: Mapping[str, LazyTensor],
    ) -> None:
        self.config, self.prompts, self.site = config, prompts, site
        self.path, self.weights = path, weights

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Yield both under the names of the block's module."""
        groups, width = self.sizes()
        shape = (groups, self.prompts.length, width)
        yield _computed(f"{self.path}.prompts.key", shape, lambda: self.turned(self._heads(0)))
        yield _computed(f"{self.path}.prompts.value", shape, lambda: self._heads(1))

    def _heads(self, which: int) -> Float64:
        """Return the keys (0) or the values (1), before anything depends on their positions."""
        rows = _constant_rows(self.prompts, self.site)
        normed = _rms(rows, read(self.weights[f"{self.path}.{self.norm}.weight"]), self.eps())
        linear = f"{self.path}.{self.projections[which]}"
        joined = normed @ read(self.weights[f"{linear}.weight"]).T
        if f"{linear}.bias" in self.weights:
            joined = joined + read(self.weights[f"{linear}.bias"])
        groups, width = self.sizes()
        return joined.reshape(-1, groups, width).transpose(1, 0, 2)

    def sizes(self) -> tuple[int, int]:
        """Return how many key-value heads there are, and how wide each is."""
        raise NotImplementedError

    def eps(self) -> float:
        """Return the epsilon of the norm before the attention."""
        raise NotImplementedError

    def turned(self, keys: Float64) -> Float64:
        """Return the keys as they depend on their positions 0 to n - 1."""
        return keys


class _T5Prefix(_Prefix):
    norm = "layer.0.layer_norm"
    projections = ("layer.0.SelfAttention.k", "layer.0.SelfAttention.v")

    def sizes(self) -> tuple[int, int]:
        return self.config.num_heads, self.config.d_kv

    def eps(self) -> float:
        return float(self.config.layer_norm_epsilon)


class _LlamaPrefix(_Prefix):
    norm = "input_layernorm"
    projections = ("self_attn.k_proj", "self_attn.v_proj")

    def sizes(self) -> tuple[int, int]:
        heads = self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return self.config.num_key_value_heads, width

    def eps(self) -> float:
        return float(self.config.rms_norm_eps)

    def turned(self, keys: Float64) -> Float64:
        """Rotate by the angles that the model itself computes, in float32."""
        import torch
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        positions = torch.arange(self.prompts.length).unsqueeze(0)
        angles = LlamaRotaryEmbedding(self.config)(torch.zeros(1), positions)
        cos, sin = (angle[0].numpy().astype(np.float64) for angle in angles)
        one, two = np.split(keys, 2, axis=-1)
        rotated: Float64 = keys * cos + np.concatenate([-two, one], axis=-1) * sin
        return rotated
