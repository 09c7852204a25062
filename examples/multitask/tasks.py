"""The four tasks: what they are called, how their text is cut, where their rows come from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from eptc.tasks import Task
from multitask import intents, mail, opinions
from multitask.rows import Dataset, split

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SENTIMENT", "SPAM", "TWEETS", "intent_task", "load"]

SENTIMENT = Task(
    "sentiment",
    "classification",
    labels=("negative", "positive"),
    metric="accuracy",
    aliases=("reviews",),
    max_length=64,
)
TWEETS = Task("tweets", "regression", metric="pearson", aliases=("ratings",), max_length=64)
SPAM = dataclasses.replace(
    SENTIMENT, name="spam", labels=("ham", "spam"), aliases=("mail",), max_length=64
)


def intent_task(labels: tuple[str, ...]) -> Task:
    """Return the task of telling a command's intent; the labels come from the package."""
    return dataclasses.replace(
        SENTIMENT, name="intent", labels=labels, aliases=("intents",), max_length=32
    )


def load(cache: Path) -> tuple[Dataset, ...]:
    """Read and divide every task's rows, in the order of the task ids.

    Raises:
        DataError: a package cannot be had or is not what it was.
    """
    commands = intents.read(cache)
    return (
        split(SENTIMENT, opinions.read_reviews(cache)),
        split(TWEETS, opinions.read_tweets(cache)),
        split(SPAM, mail.read(cache)),
        split(intent_task(intents.labels(commands)), intents.intent_rows(commands)),
    )
