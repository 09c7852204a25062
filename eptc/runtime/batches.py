"""Answering texts in batches: where they change answers, as few as can be."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

from eptc.runtime.inputs import positive
from eptc.runtime.routing import STATIC, RoutingSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import tokenizers

__all__ = ["in_batches"]

_Answer = TypeVar("_Answer")


def in_batches(
    encodings: Sequence[tokenizers.Encoding],
    batch_size: int,
    answer: Callable[[list[tokenizers.Encoding], list[int]], list[_Answer]],
    routing: RoutingSpec = STATIC,
) -> list[_Answer]:
    """Return an answer per encoding, in given order.

    Neighbours in length are put together: they need little padding. Where padding would change
    answers, only texts of one length are; where the rows of a batch change one another's
    answers, neighbours in the given order.

    Args:
        encodings: of the texts.
        batch_size: how many are answered at once, at most.
        answer: gets some of them and their places among all.
        routing: what an answer depends on.

    Raises:
        OptionError: a size that is no integer above 0.
    """
    size = positive("batch_size", batch_size)
    lengths = [len(encoding.ids) for encoding in encodings]
    order = list(range(len(encodings)))
    if routing.mode != "batch":
        order.sort(key=lengths.__getitem__)
    answers: dict[int, _Answer] = {}
    for rows in _groups(order, lengths, size, alike=_apart(routing)):
        answers.update(zip(rows, answer([encodings[i] for i in rows], rows), strict=True))
    return [answers[i] for i in range(len(order))]


def _apart(routing: RoutingSpec) -> bool:
    """Whether only texts of one length go together."""
    return routing.reads_padding and routing.mode != "batch"


def _groups(
    order: list[int], lengths: list[int], size: int, *, alike: bool
) -> Iterator[list[int]]:
    """Yield up to `size` neighbours at a time; `alike`: of one length."""
    runs = [
        list(run)
        for _, run in itertools.groupby(order, key=lambda i: lengths[i] if alike else None)
    ]
    for run in runs:
        for start in range(0, len(run), size):
            yield run[start : start + size]
