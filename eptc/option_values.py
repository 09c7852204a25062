"""Values of a dataclass's fields, read from text."""

from __future__ import annotations

import collections.abc
import json
import types
import typing
from typing import Any, Literal, Union

from eptc.errors import OptionError

__all__ = ["option_value"]


def option_value(kind: type, name: str, text: str) -> Any:
    """Return the value of a field, of the type it is declared with.

    Args:
        kind: the dataclass.
        name: the field.
        text: JSON, or, where a string is wanted, the string itself.

    Raises:
        OptionError: it is of another type.
    """
    wanted = typing.get_type_hints(kind)[name]
    try:
        values = [json.loads(text), text]
    except ValueError:
        values = [text]
    for value in values:
        try:
            return _as(wanted, value)
        except ValueError:
            continue
    raise OptionError(f"{name} is {text!r}", expected=_said(wanted))


def _as(wanted: Any, value: Any) -> Any:
    """Return a JSON value as a type; raise ValueError where it is none."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return _as(choice, value)
            except ValueError:
                continue
    elif origin is Literal:
        # True equals 1.
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return value
    elif origin in (tuple, collections.abc.Sequence) and isinstance(value, list):
        if origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis):
            if len(arguments) == len(value):
                return tuple(_as(a, v) for a, v in zip(arguments, value, strict=True))
        else:
            return tuple(_as(arguments[0], item) for item in value)
    elif wanted is Any:
        return tuple(value) if isinstance(value, list) else value
    elif wanted is float and type(value) is int:
        return float(value)
    elif wanted is type(None) and value is None:
        return None
    elif wanted in (bool, int, float, str) and type(value) is wanted:
        return value
    raise ValueError(value)


def _said(wanted: Any) -> str:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin in (tuple, collections.abc.Sequence):
        return f"a JSON list, {wanted}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return names.get(wanted, "null" if wanted is type(None) else str(wanted))
