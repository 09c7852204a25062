"""Numbers with their units, for people."""

from __future__ import annotations

__all__ = ["readable_size"]


def readable_size(count: float) -> str:
    """Return bytes for people.

    >>> readable_size(999), readable_size(2**21)
    ('999 B', '2.0 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
