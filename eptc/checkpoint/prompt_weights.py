"""The parameters of a prompted task model: the sites' own, or what constant prompts become."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from eptc.architectures import setting
from eptc.ir.numbers import Float64, product, read
from eptc.ir.prompts import PromptLayout, PromptSite, PromptTuning
from eptc.tensors import ComputedTensor, LazyTensor

__all__ = ["prompt_weights"]


def prompt_weights(
    config: Mapping[str, Any],
    prompts: PromptTuning,
    layout: PromptLayout,
    weights: Mapping[str, LazyTensor],
) -> dict[str, LazyTensor]:
    """Return the parameters that prompts add to a task model, by canonical name; none is read.

    Constant prompts are computed in float64 and rounded once.

    Args:
        config: the task model's configuration.
        prompts: the sites.
        layout: what the model computes.
        weights: the parameters of the task model without prompts.
    """
    llama = prompts.model_type == "llama"
    places: dict[str, PromptSite] = {}
    if prompts.input is not None and not (layout.constant and 0 in layout.layers):
        places["model.prompts" if llama else "encoder.prompts"] = prompts.input
    stack = "model.layers" if llama else "encoder.block"
    last = int(setting(config, "num_hidden_layers" if llama else "num_layers")) - 1
    found: dict[str, LazyTensor] = {}
    for number, site in prompts.blocks.items():
        path = f"{stack}.{number}"
        dropped = number + 1 in layout.layers or (llama and number == last)
        if layout.constant and dropped:
            rows = _Rows(prompts, site, path, config, weights)
            found |= dict(rows.llama() if llama else rows.t5())
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
    return np.asarray(rows if site.shared is None else rows + read(site.shared), np.float64)


def _computed(
    name: str, shape: tuple[int, ...], compute: Callable[[], Float64]
) -> tuple[str, LazyTensor]:
    return name, ComputedTensor(name, "float64", shape, compute)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Constant prompts as one block's attention sees them: keys and values [groups, n, d]."""

    prompts: PromptTuning
    site: PromptSite
    path: str
    config: Mapping[str, Any]
    weights: Mapping[str, LazyTensor]

    def t5(self) -> Iterator[tuple[str, LazyTensor]]:
        """Yield both of a T5 block, by name."""
        eps = float(setting(self.config, "layer_norm_epsilon", 1e-6))
        groups, width = (int(setting(self.config, key)) for key in ("num_heads", "d_kv"))
        for part, linear in (("key", "k"), ("value", "v")):
            yield self._named(
                part, groups, width, "layer.0.layer_norm", f"layer.0.SelfAttention.{linear}", eps
            )

    def llama(self) -> Iterator[tuple[str, LazyTensor]]:
        """Yield both of a Llama layer, by name; the keys rotated to the positions 0 to n - 1."""
        eps = float(setting(self.config, "rms_norm_eps", 1e-6))
        heads = int(setting(self.config, "num_attention_heads"))
        groups = int(setting(self.config, "num_key_value_heads") or heads)
        width = self.weights[f"{self.path}.self_attn.k_proj.weight"].shape[0] // groups
        for part, turn in (("key", self._rotated), ("value", np.asarray)):
            yield self._named(
                part, groups, width, "input_layernorm", f"self_attn.{part[0]}_proj", eps, turn
            )

    def _named(
        self,
        part: str,
        groups: int,
        width: int,
        norm: str,
        linear: str,
        eps: float,
        turn: Callable[[Float64], Float64] = np.asarray,
    ) -> tuple[str, LazyTensor]:
        shape = (groups, self.prompts.length, width)

        def compute() -> Float64:
            rows = _constant_rows(self.prompts, self.site)
            normed = rows / np.sqrt((rows * rows).mean(axis=-1, keepdims=True) + eps)
            normed = normed * read(self.weights[f"{self.path}.{norm}.weight"])
            joined = product(normed, read(self.weights[f"{self.path}.{linear}.weight"]).T)
            if (bias := self.weights.get(f"{self.path}.{linear}.bias")) is not None:
                joined = joined + read(bias)
            heads = joined.reshape(-1, groups, width).transpose(1, 0, 2)
            return np.ascontiguousarray(turn(heads))

        return _computed(f"{self.path}.prompts.{part}", shape, compute)

    def _rotated(self, keys: Float64) -> Float64:
        """Rotate by the angles that the model itself computes, in float32."""
        import torch
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(dict(self.config)))
        angles = rotary(torch.zeros(1), torch.arange(self.prompts.length).unsqueeze(0))
        cos, sin = (angle[0].numpy().astype(np.float64) for angle in angles)
        one, two = np.split(keys, 2, axis=-1)
        rotated: Float64 = keys * cos + np.concatenate([-two, one], axis=-1) * sin
        return rotated
