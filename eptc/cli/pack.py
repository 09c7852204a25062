"""`eptc pack`: the tasks of a pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from eptc.cli.common import FOLDER, command, json_option, progress_shown, source_options

__all__ = ["pack"]


@click.group()
def pack() -> None:
    """Add tasks to a pack, remove and list them.

    `eptc export --layout pack` builds one: many tasks over one base. Nothing of it is built
    again here.
    """


@pack.command()
@click.argument("folder", type=FOLDER, metavar="PACK")
@click.argument("ckpt", type=FOLDER)
@click.option("--task", help="Name, alias or id of the task; not needed where there is one.")
@click.option("--as", "name", help="What it is called in the pack; without it: its name.")
@source_options
@click.option("--no-verify", is_flag=True, help="Skip parity; the manifest records it.")
@click.option("-v", "--verbose", is_flag=True, help="Show stages in a pipe as well.")
@json_option
@command
def add(
    folder: Path, ckpt: Path, no_verify: bool, verbose: bool, as_json: bool, **options: Any
) -> None:
    """Add a task of CKPT, a checkpoint of any format over the pack's base.

    The task is compared with the unfolded PyTorch model as it will be served. Where they differ,
    the pack is as it was and the exit code is 1.
    """
    from eptc.packs.changes import add_task

    with progress_shown(as_json, verbose) as progress:
        manifest = add_task(folder, ckpt, verify=not no_verify, progress=progress, **options)
    name = list(manifest.tasks)[-1]
    told = manifest.tasks[name].told()
    if as_json:
        click.echo(json.dumps({"pack": str(folder), "added": name, **told}))
        return
    if not told["verified"]:
        click.echo("NOT VERIFIED: --no-verify was given, and the manifest says so")
    click.echo(
        f"{folder}: added {name}, {told['bytes']:,} bytes; tasks: {', '.join(manifest.tasks)}"
    )


@pack.command()
@click.argument("folder", type=FOLDER, metavar="PACK")
@click.argument("task")
@json_option
@command
def remove(folder: Path, task: str, as_json: bool) -> None:
    """Remove TASK and its file; who has loaded the pack goes on answering."""
    from eptc.packs.changes import remove_task

    manifest = remove_task(folder, task)
    if as_json:
        click.echo(json.dumps({"pack": str(folder), "tasks": list(manifest.tasks)}))
        return
    click.echo(f"{folder}: tasks: {', '.join(manifest.tasks)}")


@pack.command("list")
@click.argument("folder", type=FOLDER, metavar="PACK")
@json_option
@command
def list_(folder: Path, as_json: bool) -> None:
    """List the tasks: labels, ranks, sizes, where they come from."""
    from eptc.runtime.pack_manifest import read_pack

    manifest = read_pack(folder)
    tasks = {name: entry.told() for name, entry in manifest.tasks.items()}
    if as_json:
        click.echo(json.dumps({"pack": str(folder), "tasks": tasks}))
        return
    from eptc.tables import print_tasks

    print_tasks(tasks)
