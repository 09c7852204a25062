"""Interleaved rounds and paired ratios."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.results import Ratio

__all__ = ["FEWEST", "order_of_rounds", "paired_overheads", "paired_ratio", "turn_value"]

# Below this many rounds an interval over rounds means nothing.
FEWEST = 6
_RESAMPLES = 9999


def order_of_rounds(names: Sequence[str], rounds: int, *, seed: int) -> list[list[str]]:
    """Return who is asked in which order: every name once a round, each round shuffled anew.

    What drifts slowly (heat, a neighbour's load) then falls on all alike, and what one leaves
    behind (a full cache) on a different one each time.
    """
    generator = np.random.default_rng(seed)
    return [[names[i] for i in generator.permutation(len(names))] for _ in range(rounds)]


def turn_value(seconds: Sequence[float]) -> float:
    """Return the median of a turn's calls; the first, which wakes the threads, is left out.

    A turn of one or two calls is so long that waking does not show.
    """
    return float(np.median(seconds[1:] if len(seconds) > 2 else seconds))


def paired_ratio(a: Sequence[float], b: Sequence[float], *, seed: int) -> Ratio:
    """Return the median over rounds of a / b, with a 95 % interval.

    The interval is the percentile bootstrap's over rounds: a round is drawn as a whole, so that
    what slows down both sides of a round cancels out.

    Args:
        a: a value for each round.
        b: the other side's, in the same order.
        seed: of the bootstrap.
    """
    ratios = np.asarray(a, float) / np.asarray(b, float)
    estimate = float(np.median(ratios))
    if len(ratios) < FEWEST:
        return Ratio(estimate, None, None, len(ratios))
    draws = np.random.default_rng(seed).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return Ratio(estimate, float(low), float(high), len(ratios))


def paired_overheads(
    a: Sequence[float], b: Sequence[float], base: Sequence[float], *, seed: int
) -> Ratio | None:
    """Return the median over rounds of (a - base) / (b - base), as `paired_ratio` does.

    None where b may cost nothing beside the base: its 95 % interval begins at 1 or below, or
    there are too few rounds for one.
    """
    low = paired_ratio(b, base, seed=seed).low
    if low is None or low <= 1:
        return None
    ours, theirs = (np.asarray(side, float) - np.asarray(base, float) for side in (a, b))
    return paired_ratio(ours.tolist(), theirs.tolist(), seed=seed)
