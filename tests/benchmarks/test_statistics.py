"""Ratios and their intervals on data whose ratio is known; the order of the rounds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics import (
    FEWEST,
    order_of_rounds,
    paired_overheads,
    paired_ratio,
    turn_value,
)


def drifting(ratio: float, rounds: int, seed: int) -> tuple[list[float], list[float]]:
    """Return two sides of noisy rounds; the machine's speed drifts far more than they differ."""
    generator = np.random.default_rng(seed)
    speed = np.exp(np.cumsum(generator.normal(0, 0.2, rounds)))
    noise = np.exp(generator.normal(0, 0.05, (2, rounds)))
    return list(ratio * speed * noise[0]), list(speed * noise[1])


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_the_interval_covers_the_known_ratio_as_often_as_it_says(ratio: float) -> None:
    covered = 0
    for seed in range(200):
        found = paired_ratio(*drifting(ratio, 30, seed), seed=seed)
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.estimate <= found.high
        covered += found.low <= ratio <= found.high
    # 95 % of 200, with four standard deviations of such a count to either side.
    assert 178 <= covered <= 200


def test_pairing_takes_out_what_slows_down_both() -> None:
    a, b = drifting(0.9, 30, seed=1)
    paired = paired_ratio(a, b, seed=0)
    shuffled = paired_ratio(a, b[::-1], seed=0)
    assert paired.high is not None
    assert paired.low is not None
    assert shuffled.high is not None
    assert shuffled.low is not None
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 4


def test_the_same_seed_gives_the_same_interval() -> None:
    a, b = drifting(1.1, 12, seed=3)
    assert paired_ratio(a, b, seed=5) == paired_ratio(a, b, seed=5)


def test_few_rounds_have_no_interval() -> None:
    a, b = drifting(2.0, FEWEST, seed=0)
    assert paired_ratio(a, b, seed=0).low is not None
    few = paired_ratio(a[:-1], b[:-1], seed=0)
    assert (few.low, few.high, few.rounds) == (None, None, FEWEST - 1)


def test_one_slow_round_moves_no_median() -> None:
    assert paired_ratio([1.0] * 9 + [50.0], [2.0] * 10, seed=0).estimate == 0.5


def test_everyone_is_asked_once_a_round_in_a_new_order() -> None:
    names = ["a", "b", "c", "d"]
    order = order_of_rounds(names, 50, seed=0)
    assert [sorted(round_) for round_ in order] == [names] * 50
    # Nobody always comes first, or always after the same one.
    assert {round_[0] for round_ in order} == set(names)
    assert len({tuple(round_) for round_ in order}) > 12  # of 24 orders there are
    assert order == order_of_rounds(names, 50, seed=0)
    assert order != order_of_rounds(names, 50, seed=1)


@pytest.mark.parametrize(
    ("seconds", "value"),
    [([9.0, 1.0, 2.0, 3.0], 2.0), ([9.0, 1.0, 3.0], 2.0), ([2.0, 4.0], 3.0), ([5.0], 5.0)],
)
def test_a_turn_leaves_out_the_call_that_wakes_the_threads(
    seconds: list[float], value: float
) -> None:
    assert turn_value(seconds) == value


def test_overheads_are_divided_where_there_is_one() -> None:
    base = [1.0, 2.0, 1.0, 4.0, 1.0, 2.0]
    ours, theirs = ([factor * second for second in base] for factor in (1.1, 1.4))
    found = paired_overheads(ours, theirs, base, seed=0)
    assert found is not None
    assert found.estimate == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25)

    assert paired_overheads(ours, base, base, seed=0) is None
    unsure = [0.9, 1.8, 1.1, 4.4, 0.9, 2.2]
    assert paired_overheads(ours, unsure, base, seed=0) is None
    assert paired_overheads(ours[:2], theirs[:2], base[:2], seed=0) is None
