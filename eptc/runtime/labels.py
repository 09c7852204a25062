"""From a written answer to one of a closed set of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["label_index"]


def label_index(answer: str, labels: Sequence[str]) -> int | None:
    """Return which label an answer is, or None where it is none of them.

    Space around it, letter case and closing punctuation do not count, unless that would leave
    two labels to choose from.

    >>> label_index(" Entailment.", ["neutral", "entailment"])
    1
    >>> label_index("maybe", ["neutral", "entailment"]) is None
    True
    """
    if (exact := answer.strip()) in labels:
        return list(labels).index(exact)
    found = [i for i, label in enumerate(labels) if _plain(label) == _plain(answer)]
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".!,?:;").rstrip()
