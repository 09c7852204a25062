"""`eptc doctor`: what this machine can do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

import eptc
from eptc.cli.common import (
    command,
    json_option,
)

if TYPE_CHECKING:
    pass

__all__ = ["doctor"]


@click.command()
@json_option
@command
def doctor(as_json: bool) -> None:
    """Show versions, the execution providers that really start, and what each target needs."""
    report = eptc.doctor()
    if as_json:
        click.echo(json.dumps(report))
        return
    for section, entries in report.items():
        if not entries:
            continue
        click.echo(f"{section}:")
        for name, value in entries.items():
            click.echo(f"  {name}: {value}")
