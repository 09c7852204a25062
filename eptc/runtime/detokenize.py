"""Text that grows as tokens are written: no half characters, cut where a stop string begins."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime.tokenizer import TextTokenizer

__all__ = ["StopText", "TextStream"]

# What a decoder shows for bytes that are no character, or not yet one.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A token that is one byte: a run of them is decoded together, or not at all.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Tokens in, pieces of text out; the pieces together are the text of all tokens decoded.

    A token's text depends on its neighbours (spaces, bytes of one character). So the tokens of
    the piece before are decoded again with the new ones, and what is longer is new. Nothing is
    given out while the end may still change.

    Args:
        tokenizer: decodes; special tokens are no text.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece given out, and all since
        self._given = 0  # how many of them that piece has
        self._before = ""  # its text

    def push(self, token: int) -> str:
        """Return the text that is certain now and was not before; often empty."""
        self._ids.append(token)
        if self._tokenizer.has_no_text(token):  # a run of bytes goes on behind it
            return ""
        if _BYTE.fullmatch(self._tokenizer.name(token)):
            return ""
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._before):
            return ""
        piece = text[len(self._before) :]
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        self._before = self._tokenizer.decode(self._ids)
        return piece

    def end(self) -> str:
        """Return the rest."""
        piece = self._tokenizer.decode(self._ids)[len(self._before) :]
        self._ids, self._given, self._before = [], 0, ""
        return piece


class StopText:
    """Looks for stop strings in text that comes in pieces, across their borders.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return the text before a stop string, and whether one was found.

        What could be the beginning of a stop string is held until more is known.
        """
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            # The one that is complete first, so that it does not matter how the pieces are cut.
            return text[: min(found)[1]], True
        longest = max((self._beginning(text, stop) for stop in self._stops), default=0)
        cut = len(text) - longest
        self._held = text[cut:]
        return text[:cut], False

    def end(self) -> str:
        """Return what was held: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Return how many characters at the end of a text begin a stop string."""
        lengths = range(min(len(text), len(stop) - 1), 0, -1)
        return next((n for n in lengths if text.endswith(stop[:n])), 0)
