"""Choosing the next token: the likeliest, or one drawn from a filtered distribution."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from eptc.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime.graph import NumpyArray

__all__ = ["Greedy", "Sampler", "Sampling", "filtered"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters apply in this order, as in transformers.

    Args:
        temperature: the logits are divided by it; above 0.
        top_k: only so many of the likeliest tokens stay, and those that equal the last of them.
        top_p: only the likeliest tokens stay whose probabilities just add up to it or more;
            above 0, at most 1.
        seed: the same seed draws the same tokens; None: another one each time.

    Raises:
        OptionError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise OptionError(
                f"temperature is {self.temperature!r}",
                expected="a number above 0",
                fix="for the likeliest token each time, leave do_sample out",
            )
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            raise OptionError(f"top_k is {self.top_k!r}", expected="an integer, 1 or more")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise OptionError(f"top_p is {self.top_p!r}", expected="a number above 0, at most 1")
        if self.seed is not None and (not _is_integer(self.seed) or self.seed < 0):
            raise OptionError(f"seed is {self.seed!r}", expected="an integer, 0 or more")


class Greedy:
    """Chooses the likeliest token of each row; the first of those that are equal."""

    def __call__(self, logits: NumpyArray, rows: NumpyArray) -> NumpyArray:
        """Return a token per chosen row.

        Args:
            logits: float [batch, vocabulary].
            rows: which rows to choose for.
        """
        chosen: NumpyArray = logits.argmax(axis=-1)[rows]
        return chosen


class Sampler:
    """Draws tokens, each row with a generator of its own.

    A row's generator is made from the seed and the row's position among the caller's texts, so
    that what is drawn does not depend on the batch the row was put in.

    Args:
        sampling: how.
        seed: of all rows.
        positions: of the batch's rows among the caller's texts.
    """

    def __init__(self, sampling: Sampling, seed: int, positions: Sequence[int]) -> None:
        self._sampling = sampling
        self._generators = [np.random.default_rng([seed, position]) for position in positions]

    def __call__(self, logits: NumpyArray, rows: NumpyArray) -> NumpyArray:
        """Return a token per chosen row, as `Greedy` does."""
        return np.array([self._draw(logits[row], self._generators[row]) for row in rows], np.int64)

    def _draw(self, logits: NumpyArray, generator: np.random.Generator) -> int:
        scores = filtered(logits, self._sampling)
        left = np.flatnonzero(scores > -np.inf)
        cumulated = np.exp(scores[left] - scores[left].max()).cumsum()
        # One number a token, whatever was filtered. The last value may round to the sum itself.
        place = np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right")
        return int(left[min(int(place), len(left) - 1)])


def filtered(logits: NumpyArray, sampling: Sampling) -> NumpyArray:
    """Return one row's logits [vocabulary] in float64, -inf where a token may not be drawn."""
    scores = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size:
        last = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores[scores < last] = -np.inf
    if sampling.top_p is not None and sampling.top_p < 1:
        # From the least likely on: what adds up to no more than 1 - top_p goes.
        left = np.flatnonzero(scores > -np.inf)
        order = left[np.argsort(scores[left], kind="stable")]
        shares = np.exp(scores[order] - scores[order[-1]])
        out = (shares / shares.sum()).cumsum() <= 1 - sampling.top_p
        out[-1] = False
        scores[order[out]] = -np.inf
    return scores


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
