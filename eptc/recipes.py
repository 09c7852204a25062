"""Recipes: TOML files that say everything about a build that the command line can."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptc.errors import RecipeError
from eptc.files import replacing
from eptc.options import Options
from eptc.recipe_schema import PATHS, VERSION, check_keys, check_value, keys
from eptc.toml_file import TomlFile

__all__ = ["Recipe", "read_values"]

# Paths only where they have a separator: else commands that the system looks up.
_COMMANDS = frozenset({"genai_python"})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A build: what of, where to, and how.

    Args:
        ckpt: folder of the checkpoint; None where the recipe leaves it open.
        out: place of what is built; likewise.
        options: what differs from the defaults, by the names of `eptc.export`'s arguments.
    """

    ckpt: Path | None = None
    out: Path | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `eptc.export`."""
        places = {"ckpt": self.ckpt, "out": self.out}
        return {**{k: v for k, v in places.items() if v is not None}, **self.options}

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe; its relative paths begin at its folder.

        Raises:
            RecipeError: it cannot be read, is no TOML, has a newer schema or an unknown key (the
                nearest is named), or a value of the wrong type.
        """
        file = TomlFile.read(path)
        file.check_version("recipe", VERSION)
        given = {key: value for key, value in file.data.items() if key != "schema"}
        values = read_values(file, given)
        return cls(values.pop("ckpt", None), values.pop("out", None), values)

    def save(self, path: str | Path) -> None:
        """Write the recipe, whole or not at all; paths given as relative stay so, from its folder.

        Raises:
            RecipeError: an option has no form in a file, or the place cannot be written.
        """
        path = Path(path)
        text = self._toml(path.absolute().parent)
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(
                f"a path is called {text[error.start : error.end]!a}, which is no UTF-8",
                expected="names that a TOML file can hold",
            ) from error
        try:
            with replacing(path) as file:
                file.write(data)
        except OSError as error:
            raise RecipeError(
                f"the recipe {path} cannot be written: {error.strerror or error}",
                expected="a place this user may write to",
            ) from error

    def _toml(self, folder: Path) -> str:
        import tomlkit

        defaults = {field.name: field.default for field in dataclasses.fields(Options)}
        document = tomlkit.document()
        document.add(tomlkit.comment("eptc export --recipe FILE"))
        document.add("schema", tomlkit.item(VERSION))
        for key, value in self.arguments.items():
            if key in defaults and (value in (None, defaults[key]) or value == []):
                continue
            if isinstance(value, str | Path) and key in PATHS:
                value = _relative(key, value, folder)
            try:
                document.add(key, tomlkit.item(list(value) if isinstance(value, tuple) else value))
            except (TypeError, ValueError) as error:
                raise RecipeError(
                    f"{key} is {value!r}, an object of a program, which no file can hold",
                    expected="the name of an installed one",
                ) from error
        return tomlkit.dumps(document)


def read_values(
    file: TomlFile, given: Mapping[str, Any], *, table: str = "", number: int = 0
) -> dict[str, Any]:
    """Return the values of a table whose keys are a recipe's, as `eptc.export` takes them.

    Args:
        file: the file.
        given: the table.
        table: its name; empty: the top.
        number: which of the tables of that name.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    check_keys(file, table, given, keys())
    values: dict[str, Any] = {}
    for key, value in given.items():
        value = check_value(file, key, value, table=table, number=number)
        if key in PATHS and not (key in _COMMANDS and os.sep not in value):
            value = file.place(value, key=key, table=table, number=number)
        elif key == "passes":
            value = [item if isinstance(item, str) else _pass_text(item) for item in value]
        values[key] = value
    return values


def _relative(key: str, value: str | Path, folder: Path) -> str:
    """Return a path as a recipe in a folder says it."""
    path = Path(value)
    if path.is_absolute() or (key in _COMMANDS and os.sep not in str(value)):
        return str(value)
    # `..` leads out of where a link leads to, not of the link; the last part may stay a link.
    place = path.parent.resolve() / path.name
    found = Path(os.path.relpath(place, folder.resolve())).as_posix()
    # A folder that is called `~` is not the user's home.
    return f"./{found}" if found.startswith("~") else found


def _pass_text(item: Mapping[str, Any]) -> str:
    """Return a pass and its options as `NAME:option=value,...`."""
    options = [f"{k}={_json(v)}" for k, v in item.items() if k != "name"]
    return str(item["name"]) + (":" + ",".join(options) if options else "")


def _json(value: Any) -> str:
    # `=` is only ever inside a string, where it would look like the next option's.
    return json.dumps(value, default=str).replace("=", "\\u003d")
