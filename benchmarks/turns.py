"""Asking sessions in turn: what a graph is fed, what a call is, how long a turn takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.statistics import turn_value

__all__ = ["Clock", "difference", "random_feeds", "session_call", "turn"]

Clock = Callable[[], float]

# A turn lasts this long, seconds, or some calls.
_TURN = 0.25


def random_feeds(session: Any, sizes: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Return inputs of a graph: random tokens, nothing masked, a random cache.

    Args:
        session: the graph's.
        sizes: of its symbolic dimensions.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for node in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes[size] for size in node.shape]
        if node.type == "tensor(float)":
            feeds[node.name] = rng.standard_normal(shape).astype(np.float32)
        elif "mask" in node.name:
            feeds[node.name] = np.ones(shape, np.int64)
        else:
            feeds[node.name] = rng.integers(4, 60, shape) * (node.name == "input_ids")
    return feeds


def session_call(session: Any, feeds: Mapping[str, Any]) -> Callable[[], Any]:
    """Return what computes a session's first output of those feeds that it takes."""
    wanted = {node.name for node in session.get_inputs()}
    taken = {name: array for name, array in feeds.items() if name in wanted}
    first = session.get_outputs()[0].name
    return lambda: session.run([first], taken)[0]


def difference(a: Any, b: Any) -> float:
    """Return how far two answers are apart, as a part of the largest number: two digits."""
    return float(f"{np.abs(a - b).max() / max(1e-30, np.abs(b).max()):.1e}")


def turn(call: Callable[[], Any], clock: Clock = time.perf_counter, *, at_least: int = 3) -> float:
    """Call for a while; return the median in seconds.

    Args:
        call: what is timed.
        clock: what it is timed with.
        at_least: calls.
    """
    seconds: list[float] = []
    while sum(seconds) < _TURN or len(seconds) < at_least:
        start = clock()
        call()
        seconds.append(clock() - start)
    return turn_value(seconds)
