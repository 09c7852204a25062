"""Key-value caches around tensors that are graph inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["cache", "flatten"]


def cache(tensors: Sequence[torch.Tensor]) -> Any:
    """Return a cache that holds key and value of layer 0, of layer 1, and so on.

    The layers are filled directly: `update` on an empty layer would concatenate with nothing,
    a node per tensor.
    """
    result = DynamicCache()
    for key, value in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device = key.dtype, key.device
        layer.keys, layer.values = key, value
        layer.is_initialized = True
        result.layers.append(layer)
    return result


def flatten(cache: Any) -> list[torch.Tensor]:
    """Return key and value of each layer, in order."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
