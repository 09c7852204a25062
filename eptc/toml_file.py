"""A TOML file that a person wrote: what it says, and on which line."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptc.errors import RecipeError

__all__ = ["TomlFile"]

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*=""")


@dataclasses.dataclass(frozen=True)
class TomlFile:
    """A file as it was read.

    Args:
        path: the file.
        text: its text.
        data: what it says.
    """

    path: Path
    text: str
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> TomlFile:
        """Read a file.

        Raises:
            RecipeError: it cannot be read, or is no TOML; the message has the line.
        """
        path = Path(path)
        try:
            # Some editors begin every file with a byte order mark.
            text = path.read_bytes().decode("utf-8-sig")
            return cls(path, text, tomllib.loads(text))
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{path} is no text in UTF-8: byte {error.start}", expected="a TOML file"
            ) from error
        except (ValueError, RecursionError) as error:  # also of integers that are too long
            raise RecipeError(f"{path} is no TOML: {error}", expected="a TOML file") from error

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the file begin at."""
        return self.path.absolute().parent

    def place(self, text: str, *, key: str, table: str = "", number: int = 0) -> Path:
        """Return the path that a key names: from the file's folder; `~` is the user's home.

        Raises:
            RecipeError: no file can be called that.
        """
        if "\0" in text:
            raise self.error(
                f"{key} is {text!r}", key=key, table=table, number=number, expected="a path"
            )
        # Which, unlike pathlib's, takes `~x` for a name where there is no user x.
        return self.folder / os.path.expanduser(text)  # noqa: PTH111

    def check_version(self, what: str, version: int) -> None:
        """Check the key `schema` of a file.

        Args:
            what: what kind of file it is.
            version: the newest that is understood.

        Raises:
            RecipeError: there is none, it is no number, or newer.
        """
        if "schema" not in self.data:
            raise RecipeError(
                f"{self.path} does not say which schema it has",
                expected=f"a {what} that says schema = {version}",
            )
        found = self.data["schema"]
        if type(found) is not int or found < 1:
            raise self.error(f"schema is {found!r}", key="schema", expected=f"{version}")
        if found > version:
            raise self.error(
                f"the {what} has schema {found}", key="schema", expected=f"{version} or older",
                fix="upgrade eptc (pip install -U ept-compiler)",
            )  # fmt: skip

    def error(
        self,
        found: str,
        *,
        key: str,
        table: str = "",
        number: int = 0,
        expected: str | None = None,
        fix: str | None = None,
    ) -> RecipeError:
        """Return an error about a key.

        Args:
            found: what was found.
            key: the key.
            table: the table it is in; empty: at the top.
            number: which of the tables of that name, where there are several.
            expected: what was expected.
            fix: what to do.
        """
        line = self._line(key, table, number)
        where = f"{self.path}, line {line}" if line else f"{self.path}"
        return RecipeError(f"{where}: {found}", expected=expected, fix=fix)

    def _line(self, key: str, table: str, number: int) -> int | None:
        """Return the line of a key; None where a look at each line does not tell it."""
        if '"""' in self.text or "'''" in self.text:
            return None
        here, seen = "", -1
        for place, line in enumerate(self.text.splitlines(), 1):
            if header := _HEADER.match(line):
                here = header[2]
                seen += here == table
                if here == f"{table}.{key}".strip("."):
                    return place
            elif (
                here == table
                and (not table or seen == number)
                and (found := _KEY.match(line))
                and found[1] == key
            ):
                return place
        return None
