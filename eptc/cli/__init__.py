"""The command line: every verb a thin call into the package; only this package prints."""

from __future__ import annotations

import contextlib
import importlib
import signal
from typing import Any

import click

import eptc
from eptc.cli.common import command

__all__ = ["main"]

# The module of each verb.
_HOMES = {
    "bench": "engines",
    "build": "build",
    "convert": "checkpoints",
    "doctor": "machine",
    "export": "export",
    "inspect": "checkpoints",
    "pack": "pack",
    "parity": "checks",
    "recipe": "recipe",
    "run": "engines",
    "verify": "checks",
}


class _Group(click.Group):
    """Runs option callbacks under the same error handling as the commands; loads verbs late."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's interface
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _HOMES:
            return None
        module = importlib.import_module(f"eptc.cli.{_HOMES[cmd_name]}")
        found: click.Command = getattr(module, cmd_name)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        return command(super().invoke)(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(eptc.__version__, prog_name="eptc")
def main() -> None:
    """Compile trained EPT checkpoints into small, fast, verified engines.

    Exit codes: 0 done; 1 the engine failed the parity gate; 2 bad usage or bad input; 70 a bug in
    eptc; 130 interrupted.
    """
    # A polite kill ends like Ctrl-C: drafts are removed.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
