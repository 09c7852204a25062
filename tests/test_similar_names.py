"""What a misspelt name was to be."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from eptc.similar_names import did_you_mean, similar


@pytest.mark.parametrize(
    ("name", "known", "most", "expected"),
    [
        ("tune", ["score", "tone"], 1, ": did you mean 'tone'?"),
        ("sst3", ["cola", "sst", "sst2"], 3, ": did you mean 'sst' or 'sst2'?"),
        ("sst3", ["cola", "sst", "sst2", "sst-2"], 3, ": did you mean 'sst', 'sst2' or 'sst-2'?"),
        ("sst3", ["cola", "sst", "sst2"], 1, ": did you mean 'sst'?"),
        ("tune", ["tone", "tone"], 3, ": did you mean 'tone'?"),
        ("tune", ["score"], 1, ""),
        ("tune", [], 1, ""),
    ],
)
def test_names_what_is_like_it(name: str, known: list[str], most: int, expected: str) -> None:
    assert did_you_mean(name, known, most) == expected


@pytest.mark.parametrize("known", [["tane", "tone", "tine"], {"tone": 1, "tine": 2, "tane": 3}])
def test_the_order_of_what_is_known_does_not_matter(known: Iterable[str]) -> None:
    assert similar("tne", known, 2) == ["tone", "tine"]
