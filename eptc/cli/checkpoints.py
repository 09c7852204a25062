"""`eptc inspect` and `eptc convert`: what a checkpoint holds, and its native form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import eptc
from eptc.cli.common import (
    FOLDER,
    command,
    json_option,
    source_options,
)

if TYPE_CHECKING:
    pass

__all__ = ["convert", "inspect"]


@click.command()
@click.argument("path", type=FOLDER, metavar="CKPT|BUNDLE|PACK")
@source_options
@json_option
@command
def inspect(path: Path, as_json: bool, **options: Any) -> None:
    """Show what a checkpoint, a bundle or a pack holds: tasks, experts, margins, sizes."""
    report = eptc.inspect(path, **options)
    if as_json:
        click.echo(json.dumps(report))
        return
    from eptc.tables import print_inspection

    print_inspection(report)


@click.command()
@click.argument("ckpt", type=FOLDER)
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder to write.")
@source_options
@click.option("--force", is_flag=True, help="Replace what lies at --out.")
@json_option
@command
def convert(ckpt: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a folder of the released code as a native checkpoint, complete from then on."""
    path = eptc.convert(ckpt, out=out, **options)
    click.echo(json.dumps({"checkpoint": str(path)}) if as_json else f"{path}")
