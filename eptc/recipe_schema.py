"""What a recipe may say: a JSON Schema made from the options of a build."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import jsonschema

from eptc.options import Options
from eptc.pass_base import AdapterPass, GraphPass
from eptc.similar_names import did_you_mean
from eptc.toml_file import TomlFile

__all__ = ["PATHS", "VERSION", "check_keys", "check_value", "keys", "recipe_schema"]

VERSION = 1


def _is_number(_: object, value: object) -> bool:
    """Whether it is one as a float: neither infinite nor an integer beyond all floats."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


# To JSON Schema `2.0` is an integer; to a build it is none. Infinity is a number of TOML alone.
_Validator: Any = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: type(value) is int,
            "number": _is_number,
        }
    ),
)
_PLAIN = {str: "string", Path: "string", bool: "boolean", int: "integer", float: "number"}
# A pass of an installed package: its options beside its name, or as on the command line.
_PASS = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": "^[^:]+$"}},
            "propertyNames": {"pattern": "^\\w+$"},
            "required": ["name"],
        },
    ]
}
_SAID = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of recipes: every option of a build is a key."""
    about = _described()
    properties: dict[str, Any] = {
        "schema": {"const": VERSION, "description": "Version of the recipe's form."}
    }
    for name, found in keys().items():
        properties[name] = {**found, "description": about[name]}
    for field in dataclasses.fields(Options):
        if isinstance(field.default, str | bool | int | float) and field.name in properties:
            properties[field.name]["default"] = field.default
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of eptc",
        "description": "What `eptc export --recipe FILE` builds. Relative paths begin at the "
        "recipe's folder.",
        "type": "object",
        "properties": properties,
        "required": ["schema"],
        "additionalProperties": False,
    }


@functools.cache
def keys() -> Mapping[str, dict[str, Any]]:
    """Return what each key of a recipe may be: checkpoint and place, and the options' fields."""
    hints = typing.get_type_hints(Options)
    found: dict[str, dict[str, Any]] = {"ckpt": {"type": "string"}, "out": {"type": "string"}}
    for field in dataclasses.fields(Options):
        found[field.name] = _schema(hints[field.name])
    # Which the command line has, and builds every one of.
    found["precision"]["enum"].append("all")
    return found


def _paths() -> frozenset[str]:
    hints = typing.get_type_hints(Options)
    found = {name for name, hint in hints.items() if Path in typing.get_args(hint)}
    return frozenset({"ckpt", "out"} | found)


PATHS = _paths()
"""The keys that are files and folders."""


def check_keys(file: TomlFile, table: str, given: Mapping[str, Any], known: Any) -> None:
    """Raise RecipeError for a key that is not known; the nearest one is named."""
    for key in given:
        if key not in known:
            raise file.error(
                f"there is no key {key!r}{did_you_mean(key, known)}", key=key, table=table,
                expected=", ".join(known),
            )  # fmt: skip


def check_value(file: TomlFile, key: str, value: Any, *, table: str = "", number: int = 0) -> Any:
    """Return the value of a recipe's key, of the type a build wants.

    Args:
        file: where it is said.
        key: the key.
        value: its value.
        table: the table it is in.
        number: which of the tables of that name.

    Raises:
        RecipeError: it is of another type, or none of the values there are.
    """
    schema = keys()[key]
    if not _Validator(schema).is_valid(value):
        known = schema.get("enum", ())
        raise file.error(
            f"{key} is {value!r}" + (did_you_mean(value, known) if isinstance(value, str) else ""),
            key=key, table=table, number=number, expected=_said(schema),
        )  # fmt: skip
    return float(value) if schema.get("type") == "number" else value


def _schema(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema of a type; what is no value in a file is left out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        if {AdapterPass, GraphPass} <= set(arguments):
            return _PASS
        choices: list[dict[str, Any]] = []
        for argument in arguments:
            if argument is not type(None) and (found := _schema(argument)) not in choices:
                choices.append(found)
        return choices[0] if len(choices) == 1 else {"anyOf": choices}
    if origin in (list, collections.abc.Sequence):
        return {"type": "array", "items": _schema(arguments[0])}
    raise TypeError(f"an option of the type {hint} has no form in a recipe")


def _said(schema: Mapping[str, Any]) -> str:
    """Return in words what a schema allows."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(_said(choice) for choice in schema["anyOf"])
    if schema["type"] == "array":
        return f"a list, each item {_said(schema['items'])}"
    if schema["type"] == "object":
        return "a table with " + ", ".join(schema["required"])
    return _SAID[schema["type"]]


def _described() -> dict[str, str]:
    """Return what `export` says of each of its arguments."""
    from eptc.build import export

    text = inspect.getdoc(export) or ""
    section = textwrap.dedent(text.partition("Args:\n")[2].partition("\nReturns:")[0])
    entries = re.split(r"^(?=\w+:)", section, flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries if entry.strip())
    return {name: " ".join(rest.split()).replace("`", "") for name, _, rest in pairs}
