"""Answering texts in batches of like length."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from eptc.runtime.inputs import positive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import tokenizers

__all__ = ["in_batches"]

_Answer = TypeVar("_Answer")


def in_batches(
    encodings: Sequence[tokenizers.Encoding],
    batch_size: int,
    answer: Callable[[list[tokenizers.Encoding], list[int]], list[_Answer]],
) -> list[_Answer]:
    """Return an answer per encoding, in given order; neighbours in length need little padding.

    Args:
        encodings: of the texts.
        batch_size: how many are answered at once.
        answer: gets some of them and their places among all.

    Raises:
        OptionError: a size that is no integer above 0.
    """
    size = positive("batch_size", batch_size)
    order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
    answers: dict[int, _Answer] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        answers.update(zip(rows, answer([encodings[i] for i in rows], rows), strict=True))
    return [answers[i] for i in range(len(order))]
