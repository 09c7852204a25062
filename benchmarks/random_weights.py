"""Random weights for a model's dimensions, in little memory."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["generator", "meta_model", "model_class", "write_streamed"]


def model_class(config: Any) -> Any:
    """Return the class of the task model of a configuration."""
    import transformers

    from eptc.architectures import architecture

    return getattr(transformers, architecture(config).task_class)


def meta_model(config: Any) -> Any:
    """Return a model that has shapes and no weights."""
    import torch

    with torch.device("meta"):
        return model_class(config)(config)


def write_streamed(config: Any, folder: Path, *, seed: int = 0) -> None:
    """Write a model with random float16 weights, a shard for each layer, in little memory.

    Args:
        config: its configuration.
        folder: an existing folder.
        seed: of the weights.
    """
    from safetensors.numpy import save_file

    config.dtype = "float16"
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in model.named_parameters():
        layer = "-".join(part for part in name.split(".")[:3] if part not in ("model", "weight"))
        shards.setdefault(f"model-{layer}.safetensors", []).append((name, tuple(parameter.shape)))
    index: dict[str, str] = {}
    for shard, parameters in shards.items():
        tensors = {name: _random_float16(name, shape, seed) for name, shape in parameters}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    )


def _random_float16(name: str, shape: tuple[int, ...], seed: int) -> Any:
    if len(shape) == 1:  # of a norm
        return np.ones(shape, np.float16)
    count = int(np.prod(shape))
    bits = np.frombuffer(generator(name, seed).bytes(2 * count), np.uint16)
    # Random sign and mantissa, the exponent of 2**-6: of the size trained weights have, and
    # many times faster than a normal distribution.
    return ((bits & 0x83FF) | (9 << 10)).astype(np.uint16).view(np.float16).reshape(shape)


def generator(name: str, seed: int) -> np.random.Generator:
    """Return a generator for one tensor, which does not depend on what others there are."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
