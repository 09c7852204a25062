"""What a misspelt name was to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "similar"]


def similar(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Return the known names that are most like this one, the likest first; none where none is.

    Args:
        name: what was given.
        known: what there is.
        most: how many names are returned at most.
    """
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), most, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return `: did you mean ...?` where known names are like this one, else nothing.

    Args:
        name: what was given.
        known: what there is.
        most: how many names are told at most.
    """
    found = [repr(each) for each in similar(name, known, most)]
    if not found:
        return ""
    listed = f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]
    return f": did you mean {listed}?"
