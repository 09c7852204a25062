"""The options that choose where an engine runs, the same for every command that runs one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from eptc.cli.common import with_options
from eptc.errors import OptionError

if TYPE_CHECKING:
    from eptc.runtime import Provider

__all__ = ["provider_options"]

_FORM = "NAME[:OPTION=VALUE,...], such as cuda or tensorrt:cache=engines"


def provider_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options `--provider` and `--allow-fallback`, as `Engine.load` takes them."""
    options = (
        click.option(
            "--provider",
            "providers",
            multiple=True,
            metavar="NAME[:OPTION=VALUE,...]",
            callback=_providers,
            help="cpu, cuda or tensorrt, with its options; in order of preference where repeated.",
        ),
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Let the CPU run what the first provider has no kernel for.",
        ),
    )
    return with_options(function, options)


def _providers(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> list[Provider] | None:
    del context, parameter
    try:
        return [_provider(text) for text in given] or None
    except OptionError as error:
        raise click.BadParameter(str(error)) from error


def _provider(text: str) -> Provider:
    name, colon, rest = text.partition(":")
    if not colon:
        return name
    options: dict[str, Any] = {}
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        if not key or not equals or key in options:
            raise OptionError(f"--provider is {text!r}", expected=_FORM)
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    """Return a number as one; ONNX Runtime takes text and numbers alike."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text
