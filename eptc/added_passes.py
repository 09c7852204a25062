"""Passes that a build runs beside eptc's own: named, with options as text, or given as objects."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eptc.errors import OptionError, PluginError
from eptc.option_values import option_value
from eptc.pass_base import AdapterPass, GraphPass
from eptc.plugins import Group, Plugin, find_plugin, installed
from eptc.registry import PASSES
from eptc.similar_names import did_you_mean

__all__ = ["AddedPass", "added_passes", "pass_class"]

_GROUP: Group = "eptc.passes"
_NOT_FROZEN = "its class is no frozen dataclass: write @dataclasses.dataclass(frozen=True)"


@dataclasses.dataclass(frozen=True)
class AddedPass:
    """A pass that is not eptc's.

    Args:
        step: the pass.
        origin: its package and version, or its class, where it was given as an object.
        plugin: its entry point; None where it was given as an object.
    """

    step: AdapterPass | GraphPass
    origin: str
    plugin: Plugin | None


def added_passes(given: Sequence[str | AdapterPass | GraphPass]) -> tuple[AddedPass, ...]:
    """Return the passes that a caller asks for, checked.

    Args:
        given: `NAME` or `NAME:option=value,option=value` of an installed pass, or a pass.

    Raises:
        OptionError: no such pass or option, one of eptc's own, a lossy one, or one given twice.
        PluginError: the package that has it cannot be used, or the object is no sound pass.
    """
    found: list[AddedPass] = []
    for item in given:
        added = _named(item) if isinstance(item, str) else _object(item)
        name = added.step.name
        if added.step.contract == "lossy":
            raise OptionError(
                f"the pass {name} of {added.origin} is lossy",
                expected="an exact pass: only a precision below float32 or --routing frozen may "
                "lose answers, within a budget",
            )
        if name in [other.step.name for other in found]:
            raise OptionError(f"the pass {name} is given twice", fix="give it once")
        found.append(added)
    return tuple(found)


def _named(text: str) -> AddedPass:
    name, colon, rest = text.partition(":")
    plugin = find_plugin(_GROUP, name)
    if plugin is None:
        _check_name(name)
        names = [plugin.name for plugin in installed(_GROUP)]
        raise OptionError(
            f"there is no pass {name!r}" + did_you_mean(name, names),
            expected=", ".join(names)
            if names
            else "a pass of a package that is installed: there is none",
        )
    kind = pass_class(plugin)
    with plugin.blamed("its options cannot be told"):
        options = _options(name, kind, rest) if colon else {}
    lacking = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in options
        and field.default is field.default_factory is dataclasses.MISSING
    ]
    if lacking:
        raise OptionError(
            f"the pass {name} was not given its option {lacking[0]}",
            expected=f"--pass {name}:{lacking[0]}=...",
        )
    with plugin.blamed("it cannot be made"):
        step = kind(**options)
    if why := _unsound(step):
        raise plugin.error(why)
    return AddedPass(step, str(plugin), plugin)


def pass_class(plugin: Plugin) -> type[AdapterPass] | type[GraphPass]:
    """Return the class of an entry point; raise PluginError where it cannot be used."""
    plugin.refuse_taken(PASSES)
    kind = plugin.load()
    if not (isinstance(kind, type) and issubclass(kind, AdapterPass | GraphPass)):
        raise plugin.error("it is no subclass of AdapterPass or GraphPass")
    if (name := getattr(kind, "name", None)) != plugin.name:
        raise plugin.error(f"it calls itself {name!r}")
    if "__dataclass_params__" not in vars(kind):
        raise plugin.error(_NOT_FROZEN)
    return kind


def _object(step: AdapterPass | GraphPass) -> AddedPass:
    origin = f"{type(step).__module__}:{type(step).__qualname__}"
    if not isinstance(step, AdapterPass | GraphPass):
        raise OptionError(
            f"{step!r} was given as a pass", expected="a name, an AdapterPass or a GraphPass"
        )
    if why := _unsound(step):
        raise PluginError(f"the pass {origin}: {why}")
    _check_name(step.name)
    return AddedPass(step, origin, None)


def _check_name(name: str) -> None:
    if name in PASSES:
        raise OptionError(
            f"{name} is a pass of eptc's own, which runs where it belongs",
            expected="a pass of another package, with a name of its own",
        )


def _options(name: str, kind: type, text: str) -> dict[str, Any]:
    """Read `option=value,option=value`; a value is JSON, or a string as it stands."""
    known = [field.name for field in dataclasses.fields(kind)]
    options: dict[str, Any] = {}
    # A comma inside a value is none that a name and `=` follow.
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise OptionError(
                f"the pass {name} was given {part!r}", expected=f"{name}:option=value"
            )
        if key not in known:
            raise OptionError(
                f"the pass {name} has no option {key!r}" + did_you_mean(key, known),
                expected=", ".join(known) if known else "none: it has no options",
            )
        if key in options:
            raise OptionError(f"the pass {name} was given {key} twice")
        options[key] = option_value(kind, key, value)
    return options


def _unsound(step: AdapterPass | GraphPass) -> str | None:
    """Return which rule of all passes a pass breaks."""
    kind = type(step)
    if "__dataclass_params__" not in vars(kind):
        return _NOT_FROZEN
    if not isinstance(getattr(step, "name", None), str):
        return "it has no name"
    if getattr(step, "contract", None) not in ("exact", "lossy"):
        return f"its contract is {getattr(step, 'contract', None)!r}, not 'exact' or 'lossy'"
    for field in dataclasses.fields(step):
        try:
            hash(getattr(step, field.name))
        except TypeError:
            kind_of = type(getattr(step, field.name)).__name__
            return f"its option {field.name} is a {kind_of}, which can be changed; use a tuple"
    try:
        options = step.options()
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"its options are no JSON values: {error}"
    return None if isinstance(options, Mapping) else "its options() is no mapping"
