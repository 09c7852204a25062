"""T5: encoder, first and later decoder steps, padding, gated and untied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, T5ForConditionalGeneration

# Logits and states are below 30; float32 sums in another order differ by 5e-7 of that.
ATOL = 2e-5
MODELS = ["t5", "t5-gated-untied"]


def source(rng: np.random.Generator, config: Any, batch: int, length: int) -> Any:
    """Return ids and mask; every row but the first ends with padding."""
    ids = rng.integers(2, config.vocab_size, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch):
        mask[row, length - min(2 * row, length - 1) :] = 0
    ids[mask == 0] = config.pad_token_id
    return ids, mask


class Decoding:
    """The decoder graph with the state that one source text needs."""

    def __init__(self, model: Any, ids: np.ndarray, mask: np.ndarray) -> None:
        self.model = model
        encoded = model.run("encoder", {"input_ids": ids, "attention_mask": mask})
        self.hidden = encoded.pop("last_hidden_state")
        self.fixed = {n.replace("present", "past_key_values"): v for n, v in encoded.items()}
        self.fixed["encoder_attention_mask"] = mask
        config = model.config
        shape = (len(ids), config.num_heads, 0, config.d_kv)
        self.past = {
            f"past_key_values.{layer}.decoder.{what}": np.zeros(shape, np.float32)
            for layer in range(config.num_decoder_layers)
            for what in ("key", "value")
        }

    def step(self, ids: np.ndarray) -> np.ndarray:
        outputs = self.model.run("decoder", {"input_ids": ids} | self.fixed | self.past)
        logits = outputs.pop("logits")
        self.past = {n.replace("present", "past_key_values"): v for n, v in outputs.items()}
        return np.asarray(logits)


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_encoder(
    lowered: Callable[[str], Any], rng: np.random.Generator, name: str, batch: int, length: int
) -> None:
    model = lowered(name)
    ids, mask = source(rng, model.config, batch, length)
    with torch.no_grad():
        wanted = model.reference.encoder(torch.from_numpy(ids), torch.from_numpy(mask))[0]
    found = Decoding(model, ids, mask)
    seen = mask == 1
    np.testing.assert_allclose(found.hidden[seen], wanted.numpy()[seen], rtol=0, atol=ATOL)
    key = model.reference.decoder.block[1].layer[1].EncDecAttention.k
    with torch.no_grad():
        keys = key(wanted).view(batch, length, model.config.num_heads, -1).transpose(1, 2)
    np.testing.assert_allclose(
        np.moveaxis(found.fixed["past_key_values.1.encoder.key"], 2, 1)[seen],
        np.moveaxis(keys.numpy(), 2, 1)[seen],
        rtol=0,
        atol=ATOL,
    )


@pytest.mark.parametrize("past", [0, 1, 5])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("encoder_length", [1, 9])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_decoder(
    lowered: Callable[[str], Any],
    rng: np.random.Generator,
    name: str,
    batch: int,
    encoder_length: int,
    length: int,
    past: int,
) -> None:
    """A step on a past of any length, the empty one included, gives the model's logits."""
    model = lowered(name)
    ids, mask = source(rng, model.config, batch, encoder_length)
    target = rng.integers(2, model.config.vocab_size, (batch, past + length))
    decoding = Decoding(model, ids, mask)
    if past:
        decoding.step(target[:, :past])
    found = decoding.step(target[:, past:])
    with torch.no_grad():
        wanted = model.reference(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            decoder_input_ids=torch.from_numpy(target),
        ).logits[:, past:]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=ATOL)
    assert decoding.past["past_key_values.0.decoder.key"].shape[2] == past + length


@pytest.mark.parametrize("name", MODELS)
def test_position_bias_at_every_distance(
    lowered: Callable[[str], Any], rng: np.random.Generator, name: str
) -> None:
    """Far beyond the last bucket, in one step and token by token."""
    model = lowered(name)
    length = 150
    ids, mask = source(rng, model.config, 1, length)
    target = rng.integers(2, model.config.vocab_size, (1, length))
    with torch.no_grad():
        wanted = model.reference(
            torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(target)
        ).logits.numpy()
    found = Decoding(model, ids, mask).step(target)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ATOL)
    decoding = Decoding(model, ids, mask)
    one_by_one = [decoding.step(target[:, i : i + 1]) for i in range(length)]
    np.testing.assert_allclose(np.concatenate(one_by_one, 1), wanted, rtol=0, atol=ATOL)


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    decoding = Decoding(model, ids, mask)
    tokens = np.full((len(ids), 1), model.config.decoder_start_token_id)
    for _ in range(steps):
        logits = decoding.step(tokens[:, -1:])
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_greedy(lowered: Callable[[str], Any], rng: np.random.Generator, name: str) -> None:
    """Token by token on a padded batch: what `generate` writes."""
    model = lowered(name)
    ids, mask = source(rng, model.config, 3, 9)
    wanted = model.reference.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(greedy(model, ids, mask, 12), wanted.numpy())


@pytest.mark.parametrize("base", ["t5-tiny", "t5-gated-tiny"])
def test_golden_base(lower_base: Callable[[Any, Any], Any], golden: Path, base: str) -> None:
    """Bases that other releases of transformers wrote."""
    folder = golden / "ept" / base / "base"
    reference = T5ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    model = lower_base(AutoConfig.from_pretrained(folder), reference.eval())
    stored = np.load(golden / "ept" / base / "golden" / "task0.npz")
    ids, mask = stored["input_ids"], stored["attention_mask"]
    target = stored["decoder_input_ids"]
    with torch.no_grad():
        wanted = reference(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            decoder_input_ids=torch.from_numpy(target),
        ).logits.numpy()
    found = Decoding(model, ids, mask).step(target)
    # The gated base's logits reach 39.
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=ATOL)
