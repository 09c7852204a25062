"""Mail: spam or not, 6,046 messages with their headers; a row is the subject and the body."""

from __future__ import annotations

import email
import email.header
import email.message
import html.parser
import json
import re
from typing import TYPE_CHECKING

from multitask.packages import SPAM, fetch, members
from multitask.rows import Row, key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["mail_rows", "mail_text", "read"]

# The model reads the first tokens only; what is far behind them is not kept.
_CHARACTERS = 2000


def read(cache: Path) -> list[Row]:
    """Return one row a message, label 1 for spam."""
    archive = fetch(SPAM, cache)
    return list(mail_rows(members(archive, lambda name: "/data/" in name and _is_message(name))))


def _is_message(name: str) -> bool:
    return (
        name.endswith(".json") and re.search(r"/(spam|easy-ham|hard-ham)-\d+/", name) is not None
    )


def mail_rows(files: Iterator[tuple[str, bytes]]) -> Iterator[Row]:
    """Yield a row for each message; a thread (one subject) is one group."""
    for _, content in sorted(files):
        message = json.loads(content)
        spam = message["group"].startswith("spam")
        subject, body = mail_text(message["text"])
        text = f"{subject}\n{body}"[:_CHARACTERS].strip()
        yield Row(text, int(spam), group=key(subject) if subject else "")


def mail_text(source: str) -> tuple[str, str]:
    """Return a message's subject, without reply marks and list tags, and its body as text.

    Headers other than the subject name the machine that collected the message, and the tag of
    a mailing list ("[ILUG]") names its archive: a classifier must not learn from either.
    """
    message = email.message_from_string(source.partition("\n")[2] if _mbox(source) else source)
    subject = _decoded(str(message.get("Subject", "")))
    subject = re.sub(r"^(\s*(re|fwd?|aw)\s*(\[\d+\])?:|\s*\[[^\]]*\])+", "", subject, flags=re.I)
    return " ".join(subject.split()), " ".join(_body(message).split())


def _mbox(source: str) -> bool:
    return source.startswith("From ")


def _decoded(header: str) -> str:
    try:
        return str(email.header.make_header(email.header.decode_header(header)))
    except (LookupError, UnicodeError, ValueError, email.errors.HeaderParseError):
        return header


def _body(message: email.message.Message) -> str:
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    for subtype in ("plain", "html"):
        for part in parts:
            text = _content(part) if part.get_content_subtype() == subtype else ""
            if subtype == "html" or re.match(r"\s*<(html|!doctype)", text, flags=re.I):
                text = _without_tags(text)
            if text.strip():
                return text
    return ""


def _content(part: email.message.Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    try:
        return content.decode(part.get_content_charset() or "latin-1", errors="replace")
    except LookupError:
        return content.decode("latin-1")


class _Text(html.parser.HTMLParser):
    """Collects the text between tags, without styles and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in ("style", "script")))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def _without_tags(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    return " ".join(parser.pieces)
