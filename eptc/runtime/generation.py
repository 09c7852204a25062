"""Writing text: the options of a call, a batch of answers, and one answer piece by piece."""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING

import numpy as np

from eptc.errors import OptionError, TaskError
from eptc.runtime.decoding import decode
from eptc.runtime.detokenize import StopText, TextStream
from eptc.runtime.inputs import positive
from eptc.runtime.results import Generation
from eptc.runtime.sampling import Greedy, Sampler, Sampling

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from eptc.runtime.decoding import Choose, Steps
    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.manifest import Manifest
    from eptc.runtime.spec import GenerationSpec
    from eptc.runtime.tokenizer import TextTokenizer

__all__ = ["Plan", "greedy", "limited", "planned", "sampled", "stream", "write"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call writes, every option checked.

    Args:
        limit: new tokens at most; None: what the manifest says of the task.
        stops: tokens that end an answer.
        strings: strings that end an answer and are no part of its text.
        pad: token that continues a row that has ended.
        sampling: None for the likeliest token each time.
        seed: of the sampling.
    """

    limit: int | None
    stops: tuple[int, ...]
    strings: tuple[str, ...]
    pad: int
    sampling: Sampling | None
    seed: int

    def chooser(self, positions: Sequence[int]) -> Choose:
        """Return what chooses the tokens of a batch.

        Args:
            positions: of its rows among the caller's texts.
        """
        if self.sampling is None:
            return Greedy()
        return Sampler(self.sampling, self.seed, positions)


def sampled(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling | None:
    """Return how to draw tokens, None for the likeliest each time.

    Raises:
        OptionError: a value out of its range, or one that is given without do_sample.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if do_sample:
        return sampling
    for field in dataclasses.fields(Sampling):
        if getattr(sampling, field.name) != field.default:
            raise OptionError(
                f"{field.name} is given, but the likeliest token is taken each time",
                fix=f"pass do_sample=True, or leave {field.name} out",
            )
    return None


def limited(manifest: Manifest, max_new_tokens: int | None) -> tuple[GenerationSpec, int | None]:
    """Return an engine's settings and how many tokens it may write, as far as the caller said.

    Raises:
        OptionError: a number that is none.
        TaskError: the engine writes no text.
    """
    settings = manifest.generation
    if settings is None:
        raise TaskError(
            "this engine is a classifier: it writes no text", fix="call classify instead"
        )
    if max_new_tokens is None:
        return settings, None
    return settings, positive("max_new_tokens", max_new_tokens)


def planned(
    manifest: Manifest,
    tokenizer: TextTokenizer,
    max_new_tokens: int | None,
    sampling: Sampling | None,
    stop: str | Sequence[str] | None,
    stop_token_ids: Sequence[int] | None,
) -> Plan:
    """Return how a call writes, by the options that `Engine.generate` describes.

    Raises:
        OptionError: a number of tokens that is none, a stop token outside the vocabulary, an
            empty stop string.
        TaskError: the engine writes no text.
    """
    settings, limit = limited(manifest, max_new_tokens)
    stops = settings.eos_token_id
    if stop_token_ids is not None:
        stops = _token_ids(stop_token_ids, manifest.vocab_size)
    tokens, strings = _split(stop, tokenizer)
    seed = secrets.randbits(128) if sampling is None or sampling.seed is None else sampling.seed
    return Plan(limit, (*stops, *tokens), strings, settings.pad_token_id, sampling, int(seed))


def greedy(steps: Steps, settings: GenerationSpec, limits: Sequence[int]) -> list[list[int]]:
    """Return each row's new tokens, the likeliest each time, the stop token included.

    Args:
        steps: the batch.
        settings: what ends an answer.
        limits: tokens that each row may write at most.
    """
    answers: list[list[int]] = [[] for _ in steps.first]
    running = np.ones(len(answers), bool)
    stops, pad = settings.eos_token_id, settings.pad_token_id
    for rows, tokens in decode(steps, Greedy(), running, stops=stops, pad=pad, limit=max(limits)):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            answers[row].append(token)
            running[row] &= len(answers[row]) < limits[row]
    return answers


def write(
    steps: Steps,
    positions: Sequence[int],
    tokenizer: TextTokenizer,
    plan: Plan,
    limits: Sequence[int],
) -> list[Generation]:
    """Write an answer for every row of a batch.

    Args:
        steps: the batch.
        positions: of its rows among the caller's texts.
        tokenizer: decodes.
        plan: how.
        limits: tokens that each row may write at most.
    """
    running = np.ones(len(positions), bool)
    answers = [_Answer(tokenizer, plan) for _ in positions]
    for rows, tokens in _decode(steps, positions, running, plan, max(limits)):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            answers[row].push(token)
            running[row] &= not answers[row].ended and answers[row].length < limits[row]
    return [answer.result() for answer in answers]


def stream(
    steps: Steps, tokenizer: TextTokenizer, plan: Plan, limit: int
) -> Generator[str, None, None]:
    """Yield one row's answer piece by piece, no piece empty; together they are its text."""
    running = np.ones(1, bool)
    answer = _Answer(tokenizer, plan, streams=True)
    for _, tokens in _decode(steps, [0], running, plan, limit):
        if piece := answer.push(int(tokens[0])):
            yield piece
        running[0] &= not answer.ended
    if piece := answer.end():
        yield piece


def _decode(
    steps: Steps, positions: Sequence[int], running: NumpyArray, plan: Plan, limit: int
) -> Iterator[tuple[NumpyArray, NumpyArray]]:
    choose = plan.chooser(positions)
    return decode(steps, choose, running, stops=plan.stops, pad=plan.pad, limit=limit)


class _Answer:
    """One row's answer while it is written.

    Args:
        tokenizer: decodes.
        plan: what ends it.
        streams: whether pieces of text are wanted; with stop strings they are needed anyway.
    """

    def __init__(self, tokenizer: TextTokenizer, plan: Plan, *, streams: bool = False) -> None:
        self.ended = False  # by a stop token or a stop string
        self._tokenizer = tokenizer
        self._stops = plan.stops
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._text = TextStream(tokenizer) if streams or plan.strings else None
        self._cut = StopText(plan.strings)
        self._stopped = False  # by a stop string

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain by it."""
        self._ids.append(token)
        self.ended = token in self._stops
        return "" if self._text is None else self._add(self._text.push(token))

    def end(self) -> str:
        """Return the text that was not certain before the last token."""
        if self._text is None or self._stopped:
            return ""
        last = self._add(self._text.end())
        if not self._stopped:
            self._pieces.append(self._cut.end())
            last += self._pieces[-1]
        return last

    def result(self) -> Generation:
        """Return the whole answer."""
        self.end()
        text = self._tokenizer.decode(self._ids) if self._text is None else "".join(self._pieces)
        return Generation(text, tuple(self._ids), self.ended)

    def _add(self, piece: str) -> str:
        text, found = self._cut.push(piece)
        self._pieces.append(text)
        self._stopped |= found
        self.ended |= found
        return text


def _token_ids(given: Sequence[int], vocab_size: int | None) -> tuple[int, ...]:
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise OptionError(f"stop_token_ids is {given!r}", expected="a list of token ids")
    for token in given:
        whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not whole or token < 0 or (vocab_size is not None and token >= vocab_size):
            expected = "token ids" if vocab_size is None else f"token ids below {vocab_size}"
            raise OptionError(f"stop_token_ids has {token!r}", expected=expected)
    return tuple(int(token) for token in given)


def _split(
    stop: str | Sequence[str] | None, tokenizer: TextTokenizer
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the special tokens and the strings that end an answer."""
    if stop is None:
        return (), ()
    given = [stop] if isinstance(stop, str) else stop
    if not isinstance(given, list | tuple) or not all(isinstance(s, str) and s for s in given):
        raise OptionError(
            f"stop is {stop!r}", expected="strings, or names of special tokens; none of them empty"
        )
    # No decoded text has a special token in it, so as strings they would never be met.
    tokens = {name: tokenizer.special_token(name) for name in given}
    return (
        tuple(token for token in tokens.values() if token is not None),
        tuple(name for name, token in tokens.items() if token is None),
    )
