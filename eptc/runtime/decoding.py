"""Greedy decoding with a key/value cache, one token a step.

The first step has a past of length 0 and, for a decoder-only model, the whole prompt; each later
step has one token a row and the cache of the step before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eptc.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eptc.runtime.graph import Graph, NumpyArray
    from eptc.runtime.spec import GenerationSpec

__all__ = ["decode_decoder_only", "decode_encoder_decoder", "refuse_nan"]

_PAST = "past_key_values."
_PRESENT = "present."


def decode_encoder_decoder(
    encoder: Graph,
    decoder: Graph,
    feeds: Mapping[str, NumpyArray],
    settings: GenerationSpec,
    limit: int,
) -> list[list[int]]:
    """Return each row's new tokens, the stop token included.

    Args:
        encoder: emits last_hidden_state and the cross attention's present.{i}.encoder.*.
        decoder: takes those as past_key_values.{i}.encoder.* at every step.
        feeds: the encoder's input_ids and attention_mask [batch, sequence].
        settings: start, stop and padding tokens.
        limit: new tokens a row at most.
    """
    batch = feeds["input_ids"].shape[0]
    encoded = encoder.run_bound(feeds, without=["last_hidden_state"])
    fixed: dict[str, Any] = _as_past(encoded, decoder)
    fixed["encoder_attention_mask"] = feeds["attention_mask"]
    cache = {
        name: decoder.empty(name, batch)
        for name in decoder.inputs
        if name.startswith(_PAST) and name not in fixed
    }

    def step(tokens: NumpyArray) -> NumpyArray:
        nonlocal cache
        outputs = decoder.run_bound({"input_ids": tokens, **fixed, **cache})
        cache = _as_past(outputs, decoder)
        return _last_logits(outputs)

    start = np.full((batch, 1), settings.decoder_start_token_id, np.int64)
    return _greedy(step, start, settings, limit)


def decode_decoder_only(
    model: Graph, feeds: Mapping[str, NumpyArray], settings: GenerationSpec, limit: int
) -> list[list[int]]:
    """Return each row's new tokens, the stop token included, without the prompt.

    Args:
        model: takes input_ids, attention_mask, position_ids and the cache.
        feeds: input_ids and attention_mask [batch, sequence], padded on the left.
        settings: stop and padding tokens.
        limit: new tokens a row at most.
    """
    mask = feeds["attention_mask"]
    batch = mask.shape[0]
    # Padding counts for nothing: a row's first token is at position 0 wherever it stands.
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    cache = {name: model.empty(name, batch) for name in model.inputs if name.startswith(_PAST)}

    def step(tokens: NumpyArray) -> NumpyArray:
        nonlocal cache, mask, positions
        step_feeds = {"input_ids": tokens, "attention_mask": mask, **cache}
        if "position_ids" in model.inputs:
            step_feeds["position_ids"] = positions
        outputs = model.run_bound(step_feeds)
        cache = _as_past(outputs, model)
        mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
        positions = positions[:, -1:] + 1
        return _last_logits(outputs)

    return _greedy(step, feeds["input_ids"], settings, limit)


def refuse_nan(logits: NumpyArray) -> NumpyArray:
    """Return the logits; raise InternalError where one is not a number."""
    if np.isnan(logits).any():
        raise InternalError(
            "the engine computed logits that are not numbers (NaN)",
            fix="if its precision is below float32, export it with --precision fp32",
        )
    return logits


def _greedy(
    step: Callable[[NumpyArray], NumpyArray],
    tokens: NumpyArray,
    settings: GenerationSpec,
    limit: int,
) -> list[list[int]]:
    batch = tokens.shape[0]
    rows: list[list[int]] = [[] for _ in range(batch)]
    running = np.ones(batch, bool)
    for _ in range(limit):
        chosen = step(tokens).argmax(axis=-1)
        chosen = np.where(running, chosen, settings.pad_token_id)
        for row in np.flatnonzero(running):
            rows[row].append(int(chosen[row]))
        running &= ~np.isin(chosen, settings.eos_token_id)
        if not running.any():
            break
        tokens = chosen[:, None].astype(np.int64)
    return rows


def _last_logits(outputs: Mapping[str, Any]) -> NumpyArray:
    """Return the last position's logits [batch, vocabulary]: left padding puts every row there."""
    return refuse_nan(np.array(outputs["logits"].numpy()[:, -1]))


def _as_past(outputs: Mapping[str, Any], decoder: Graph) -> dict[str, Any]:
    """Return what one step caches under the names the decoder reads it by."""
    renamed = {
        _PAST + name.removeprefix(_PRESENT): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }
    return {name: value for name, value in renamed.items() if name in decoder.inputs}
