"""`eptc parity` and `eptc verify`: whether a bundle is what it should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import eptc
from eptc.cli.common import (
    FOLDER,
    command,
    json_option,
    progress_shown,
    source_options,
)
from eptc.cli.providers import provider_options
from eptc.errors import BundleError
from eptc.parity_lines import parity_lines

if TYPE_CHECKING:
    pass

__all__ = ["parity", "verify"]


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--reference", type=FOLDER, required=True, help="The checkpoint it was made from.")
@click.option(
    "--task",
    help="Of a pack: the task that is compared; a report without it has all of the checkpoint's.",
)
@source_options
@click.option("--data", type=FOLDER, help="JSON lines file with labelled examples to score on.")
@provider_options
@click.option(
    "--report",
    "page",
    type=FOLDER,
    help="HTML file to write what is found to, failures as well; makes every check.",
)
@json_option
@command
def parity(
    bundle: Path, reference: Path, page: Path | None, as_json: bool, **options: Any
) -> None:
    """Compare BUNDLE, or a task of a pack, with the unfolded PyTorch model again.

    Exit code 1 where they differ.

    The manifest supplies --tasks and --top-k.
    """
    options["reference"] = reference
    with progress_shown(as_json) as progress:
        if page is None:
            report = eptc.parity(bundle, progress=progress, **options)
        else:
            report = eptc.report(bundle, out=page, progress=progress, **options).checked()
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    for line in parity_lines(report.summary()):
        click.echo(line)
    for name, value in (report.scores or {}).items():
        click.echo(f"{name}: {value}")


@click.command()
@click.argument("bundle", type=FOLDER)
@json_option
@command
def verify(bundle: Path, as_json: bool) -> None:
    """Check hashes, schema and graphs of BUNDLE or a pack; needs no reference, no compiler."""
    report = eptc.verify(bundle)
    if as_json:
        click.echo(json.dumps(report.to_json()))
        sys.exit(0 if report.ok else BundleError.exit_code)
    report.raise_for_problems()
    for warning in report.warnings:
        click.echo(f"eptc: warning: {warning}", err=True)
    click.echo(f"{bundle}: sound, {len(report.files)} files, {len(report.graphs)} graphs")
