"""Reading one JSON object: each value of the right form, nothing missing, nothing unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from eptc.errors import BundleError
from eptc.similar_names import did_you_mean

__all__ = ["Fields"]

_REQUIRED: Final[Any] = object()


class Fields:
    """The keys of one object, each read once; `finish` refuses what nobody read.

    Args:
        data: the JSON value.
        where: what it is, for messages.

    Raises:
        BundleError: from every method, naming `where`.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise BundleError(f"{where} is {_short(data)}", expected="an object")
        self.data: Mapping[str, Any] = data
        self._where = where
        self._read: list[str] = []

    def optional(self, key: str, default: object = _REQUIRED) -> Any:
        """Return any value; the key must be there unless there is a default."""
        self._read.append(key)
        if key in self.data:
            return self.data[key]
        if default is _REQUIRED:
            raise BundleError(f"{self._where} has no {key!r}")
        return default

    def text(self, key: str) -> str:
        """Return a non-empty string."""
        value = self.optional(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(key, value, "a non-empty string")
        return value

    def schema_version(self, newest: int, what: str, *, oldest: int = 1) -> int:
        """Return the version of the object's form; one that is not known is refused."""
        version = self.integer("schema_version", at_least=1)
        if version < oldest:
            raise BundleError(
                f"{what} has schema version {version}",
                expected=f"{oldest} or newer",
                fix="build it again: no released version of eptc wrote it",
            )
        if version > newest:
            raise BundleError(
                f"{what} has schema version {version}",
                expected=f"{newest} or older",
                fix="upgrade eptc (pip install -U ept-compiler)",
            )
        return version

    def optional_text(self, key: str, default: object = _REQUIRED) -> str | None:
        """Return a string or None."""
        return None if self.optional(key, default) is None else self.text(key)

    def choice(self, key: str, known: Sequence[str], default: object = _REQUIRED) -> str:
        """Return one of the known strings."""
        value = self.optional(key, default)
        if value not in known:
            raise self._wrong(key, value, f"one of {', '.join(known)}")
        return str(value)

    def integer(self, key: str, at_least: int = 0, default: object = _REQUIRED) -> int:
        """Return an integer that is not below `at_least`."""
        value = self.optional(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self._wrong(key, value, f"an integer, {at_least} or more")
        return value

    def optional_integer(
        self, key: str, at_least: int = 0, default: object = _REQUIRED
    ) -> int | None:
        """Return an integer or None."""
        if self.optional(key, default) is None:
            return None
        return self.integer(key, at_least, default)

    def flag(self, key: str, default: object = _REQUIRED) -> bool:
        """Return true or false."""
        value = self.optional(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def token_ids(self, key: str, default: object = _REQUIRED) -> tuple[int, ...]:
        """Return a list of token ids as a tuple."""
        value = self.optional(key, default)
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise self._wrong(key, value, "a list of token ids")
        return tuple(value)

    def counts(self, key: str, default: object = _REQUIRED) -> tuple[int, ...]:
        """Return a list of integers above 0 as a tuple."""
        value = self.optional(key, default)
        if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
            raise self._wrong(key, value, "a list of integers, 1 or more")
        return tuple(value)

    def texts(self, key: str, default: object = _REQUIRED) -> dict[str, str]:
        """Return an object whose values are strings."""
        value = self.optional(key, default)
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
            raise self._wrong(key, value, "an object of strings")
        return dict(value)

    def items(self, key: str) -> list[Any]:
        """Return a list."""
        value = self.optional(key)
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return an object."""
        value = self.optional(key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return value

    def finish(self) -> None:
        """Refuse keys that were not read: what they ask for would not be done."""
        unknown = [key for key in self.data if key not in self._read]
        if unknown:
            raise BundleError(
                f"{self._where} has the unknown key {unknown[0]!r}"
                + did_you_mean(unknown[0], self._read)
            )

    def _wrong(self, key: str, value: object, expected: str) -> BundleError:
        return BundleError(f"{self._where}: {key!r} is {_short(value)}", expected=expected)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
