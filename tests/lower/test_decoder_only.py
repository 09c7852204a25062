"""Llama: first and later steps, padding, grouped heads, tied and untied heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

# Logits are below 10; float32 sums in another order differ by 1e-6 of that.
ATOL = 2e-5
MODELS = ["llama-tied", "llama-gqa"]


def empty_past(config: Any, batch: int) -> dict[str, np.ndarray]:
    shape = (batch, config.num_key_value_heads, 0, config.head_dim)
    return {
        f"past_key_values.{layer}.{what}": np.zeros(shape, np.float32)
        for layer in range(config.num_hidden_layers)
        for what in ("key", "value")
    }


def next_past(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.replace("present", "past_key_values"): value
        for name, value in outputs.items()
        if name != "logits"
    }


def positions(mask: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(np.cumsum(mask, axis=1) - 1, 0))


def left_padded(rng: np.random.Generator, config: Any, batch: int, length: int) -> Any:
    """Return ids and mask; every row but the first starts with padding."""
    ids = rng.integers(3, config.vocab_size, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, : min(2 * row, length - 1)] = 0
    ids[mask == 0] = config.pad_token_id
    return ids, mask


@pytest.mark.parametrize("past", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_step(
    lowered: Callable[[str], Any],
    rng: np.random.Generator,
    name: str,
    batch: int,
    length: int,
    past: int,
) -> None:
    """A step on a past of any length, the empty one included, gives the model's numbers."""
    model = lowered(name)
    ids, mask = left_padded(rng, model.config, batch, past + length)
    position = positions(mask)
    given = empty_past(model.config, batch)
    cache = DynamicCache()
    if past:
        first = {
            "input_ids": ids[:, :past],
            "attention_mask": mask[:, :past],
            "position_ids": position[:, :past],
        }
        given = next_past(model.run("model", first | given))
        with torch.no_grad():
            tensors = {key: torch.from_numpy(value) for key, value in first.items()}
            model.reference(**tensors, past_key_values=cache, use_cache=True)
    step = {
        "input_ids": ids[:, past:],
        "attention_mask": mask,
        "position_ids": position[:, past:],
    }
    with torch.no_grad():
        tensors = {key: torch.from_numpy(value) for key, value in step.items()}
        wanted = model.reference(**tensors, past_key_values=cache, use_cache=True).logits
    found = model.run("model", step | given)
    seen = mask[:, past:] == 1
    np.testing.assert_allclose(found["logits"][seen], wanted.numpy()[seen], rtol=0, atol=ATOL)
    for layer, kept in enumerate(cache.layers):
        key = found[f"present.{layer}.key"]
        assert key.shape[2] == past + length
        np.testing.assert_allclose(key, kept.keys.numpy(), rtol=0, atol=ATOL)


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    past = empty_past(model.config, len(ids))
    tokens, fed, position = ids, ids, positions(mask)
    for _ in range(steps):
        feeds = {"input_ids": fed, "attention_mask": mask, "position_ids": position}
        outputs = model.run("model", feeds | past)
        fed = outputs["logits"][:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, fed], axis=1)
        mask = np.concatenate([mask, np.ones_like(fed)], axis=1)
        position, past = positions(mask)[:, -1:], next_past(outputs)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_greedy(lowered: Callable[[str], Any], rng: np.random.Generator, name: str) -> None:
    """Token by token on a left-padded batch: what `generate` writes."""
    model = lowered(name)
    ids, mask = left_padded(rng, model.config, 3, 9)
    wanted = model.reference.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(greedy(model, ids, mask, 12), wanted.numpy())


def test_golden_base(lower_base: Callable[[Any, Any], Any], golden: Path) -> None:
    """A base that other releases of transformers wrote."""
    folder = golden / "ept" / "llama-tiny" / "base"
    reference = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model = lower_base(AutoConfig.from_pretrained(folder), reference)
    stored = np.load(golden / "ept" / "llama-tiny" / "golden" / "task0.npz")
    ids, mask = stored["input_ids"], stored["attention_mask"]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    found = model.run("model", feeds | empty_past(model.config, len(ids)))["logits"]
    with torch.no_grad():
        tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
        wanted = reference(**tensors).logits.numpy()
    np.testing.assert_allclose(found[mask == 1], wanted[mask == 1], rtol=0, atol=ATOL)
