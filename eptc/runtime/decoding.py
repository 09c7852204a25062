"""Decoding with a key/value cache, one token a step.

The first step has a past of length 0 and, for a decoder-only model, the whole prompt; each later
step has one token a row and the cache of the step before, which stays in ONNX Runtime's memory.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eptc.errors import InputError, InternalError
from eptc.runtime.spec import TASK_IDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from eptc.runtime.graph import Graph, NumpyArray
    from eptc.runtime.manifest import Manifest
    from eptc.runtime.spec import GenerationSpec

__all__ = ["Choose", "Steps", "begin", "decode", "last_logits", "sound"]

_PAST = "past_key_values."
_PRESENT = "present."


class Choose(Protocol):
    """Chooses a token for some rows of the logits [batch, vocabulary]."""

    def __call__(self, logits: NumpyArray, rows: NumpyArray) -> NumpyArray:
        """Return a token per row of `rows`."""


class Steps(Protocol):
    """A batch under way.

    Args:
        first: the tokens of the first step, int64 [batch, length].
    """

    first: NumpyArray

    def step(self, tokens: NumpyArray) -> NumpyArray:
        """Continue every row by tokens [batch, length]; return logits of each of them."""

    def after(self, rows: NumpyArray, answers: NumpyArray) -> NumpyArray:
        """Return the logits [n, 1 + length, vocabulary] of given answers to some rows.

        Args:
            rows: n rows, each as often as it has answers.
            answers: their tokens [n, length].
        """


def begin(
    manifest: Manifest,
    graph: Callable[[str], Graph],
    feeds: Mapping[str, NumpyArray],
    new: Sequence[int],
) -> Steps:
    """Return a batch that is about to write.

    Args:
        manifest: of an engine that writes.
        graph: returns the graph of a role.
        feeds: input_ids and attention_mask [batch, sequence]; task_ids [batch] where the engine
            is of several tasks.
        new: tokens that each row may write at most.

    Raises:
        InputError: the model has no positions for them.
    """
    settings = manifest.generation
    assert settings is not None
    if manifest.kind == "encoder-decoder":
        return EncoderDecoder(graph("encoder"), graph("decoder"), feeds, settings)
    # Padding takes no position.
    tokens = feeds["attention_mask"].sum(axis=1)
    most, given, asked = max((t + n, t, n) for t, n in zip(tokens.tolist(), new, strict=True))
    if settings.max_positions is not None and most > settings.max_positions:
        raise InputError(
            f"a prompt of {given} tokens and {asked} new ones do not fit the model",
            expected=f"{settings.max_positions} together",
            fix="give a smaller max_new_tokens or shorter texts",
        )
    return DecoderOnly(graph("model"), feeds)


class EncoderDecoder:
    """The encoder's pass, and the decoder's steps after it.

    Args:
        encoder: emits last_hidden_state and the cross attention's present.{i}.encoder.*.
        decoder: takes those as past_key_values.{i}.encoder.* at every step.
        feeds: the encoder's input_ids and attention_mask [batch, sequence]; task_ids [batch] where
            both are told them.
        settings: the start token.
    """

    def __init__(
        self,
        encoder: Graph,
        decoder: Graph,
        feeds: Mapping[str, NumpyArray],
        settings: GenerationSpec,
    ) -> None:
        batch = feeds["input_ids"].shape[0]
        encoded = encoder.run_bound(feeds, without=["last_hidden_state"])
        self._decoder = decoder
        self._fixed: dict[str, Any] = _as_past(encoded, decoder)
        self._fixed["encoder_attention_mask"] = feeds["attention_mask"]
        if TASK_IDS in feeds:
            self._fixed[TASK_IDS] = feeds[TASK_IDS]
        self._cache = _empty_cache(decoder, batch, self._fixed)
        self.first = np.full((batch, 1), settings.decoder_start_token_id, np.int64)

    def step(self, tokens: NumpyArray) -> NumpyArray:
        """Return logits [batch, length, vocabulary]."""
        outputs = self._decoder.run_bound({"input_ids": tokens, **self._fixed, **self._cache})
        self._cache = _as_past(outputs, self._decoder)
        return _logits(outputs)

    def after(self, rows: NumpyArray, answers: NumpyArray) -> NumpyArray:
        """Return the logits of given answers, in one pass of the decoder from its start on."""
        other = copy.copy(self)
        other._fixed = {name: _taken(value, rows) for name, value in self._fixed.items()}
        other._cache = _empty_cache(self._decoder, len(rows), self._fixed)
        return other.step(np.concatenate([self.first[rows], answers], axis=1))


class DecoderOnly:
    """The steps of a decoder-only model.

    Args:
        model: takes input_ids, attention_mask, position_ids and the cache.
        feeds: input_ids and attention_mask [batch, sequence], padded on the left; task_ids
            [batch] where the model is told them.
    """

    def __init__(self, model: Graph, feeds: Mapping[str, NumpyArray]) -> None:
        self._model = model
        self._fixed = {name: feeds[name] for name in feeds if name == TASK_IDS}
        self._mask = feeds["attention_mask"]
        # Padding counts for nothing: a row's first token is at position 0 wherever it stands.
        self._positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)
        self._cache = _empty_cache(model, len(self._mask), {})
        self._started = False
        self.first = feeds["input_ids"]

    def step(self, tokens: NumpyArray) -> NumpyArray:
        """Return logits [batch, length, vocabulary]."""
        if self._started:
            self._mask = np.concatenate([self._mask, np.ones_like(tokens)], axis=1)
            self._positions = self._positions[:, -1:] + np.arange(1, 1 + tokens.shape[1])
        self._started = True
        feeds = {
            "input_ids": tokens, "attention_mask": self._mask, **self._fixed, **self._cache
        }  # fmt: skip
        if "position_ids" in self._model.inputs:
            feeds["position_ids"] = self._positions
        outputs = self._model.run_bound(feeds)
        self._cache = _as_past(outputs, self._model)
        return _logits(outputs)

    def after(self, rows: NumpyArray, answers: NumpyArray) -> NumpyArray:
        """Return the logits of given answers: the prompts once, then the answers after them."""
        if not self._started:
            self._begun = np.array(self.step(self.first)[:, -1:])
        if answers.shape[1] == 0:
            return self._begun[rows]
        other = copy.copy(self)
        other._mask, other._positions = self._mask[rows], self._positions[rows]
        other._fixed = {name: value[rows] for name, value in self._fixed.items()}
        other._cache = {name: _taken(value, rows) for name, value in self._cache.items()}
        return np.concatenate([self._begun[rows], other.step(answers)], axis=1)


def decode(
    steps: Steps,
    choose: Choose,
    running: NumpyArray,
    *,
    stops: Sequence[int],
    pad: int,
    limit: int,
) -> Iterator[tuple[NumpyArray, NumpyArray]]:
    """Yield, step by step, which rows wrote a token and those tokens.

    Args:
        steps: the batch.
        choose: chooses tokens.
        running: bool [batch], true for every row; a row that writes a stop token is cleared, and
            the caller may clear others between two steps.
        stops: tokens that end a row.
        pad: what a row that has ended is continued by.
        limit: steps at most.
    """
    tokens = steps.first
    for _ in range(limit):
        logits = last_logits(steps.step(tokens))
        rows = np.flatnonzero(running)
        chosen = choose(logits, rows)
        running[rows[np.isin(chosen, stops)]] = False
        yield rows, chosen
        if not running.any():
            return
        tokens = np.full((len(running), 1), pad, np.int64)
        tokens[rows, 0] = chosen


def last_logits(logits: NumpyArray) -> NumpyArray:
    """Return the last position's logits, float32 [batch, vocabulary], and let go of the others.

    Left padding puts every row's last token there.
    """
    return sound(logits[:, -1].astype(np.float32))


def sound(logits: NumpyArray) -> NumpyArray:
    """Return the logits; raise InternalError where a row has no largest number."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise InternalError(
            "the engine computed logits that are not numbers (NaN or infinite)",
            fix="if its precision is below float32, export it with --precision fp32",
        )
    return logits


def _logits(outputs: Mapping[str, Any]) -> NumpyArray:
    # On the CPU a view: what nobody copies is never copied.
    logits: NumpyArray = outputs["logits"].numpy()
    return logits


def _empty_cache(graph: Graph, batch: int, given: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in graph.inputs if name.startswith(_PAST) and name not in given]
    return {name: graph.empty(name, batch) for name in names}


def _taken(value: Any, rows: NumpyArray) -> NumpyArray:
    array: NumpyArray = value if isinstance(value, np.ndarray) else value.numpy()
    return array[rows]


def _as_past(outputs: Mapping[str, Any], decoder: Graph) -> dict[str, Any]:
    """Return what one step caches under the names the decoder reads it by."""
    renamed = {
        _PAST + name.removeprefix(_PRESENT): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }
    return {name: value for name, value in renamed.items() if name in decoder.inputs}
