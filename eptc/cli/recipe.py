"""Recipes on the command line: `--recipe` and `--save-recipe` of a command, `eptc recipe`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from eptc.cli.common import FOLDER, command, json_option
from eptc.errors import OutputError

__all__ = ["recipe", "recipe_options"]


def recipe_options(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take its options from a recipe, and write the recipe of what it did.

    The command has the parameters `ckpt`, `out`, `force`, `no_verify` and `as_json` beside those
    that are called as the keys of a recipe are.
    """

    @click.option(
        "--recipe",
        "recipe_file",
        type=FOLDER,
        help="TOML file with options, CKPT and --out too; what is given here as well wins. "
        "Relative paths in it begin at its folder.",
    )
    @click.option(
        "--save-recipe",
        type=FOLDER,
        help="TOML file to write, once the command succeeded: with --recipe it builds the same to "
        "the byte. With --dry-run nothing else is written.",
    )
    @functools.wraps(function)
    def wrapped(recipe_file: Path | None, save_recipe: Path | None, **given: Any) -> None:
        if recipe_file is not None:
            given |= _from_recipe(recipe_file)
            _check_kept(recipe_file, given["out"], given["force"])
        if given["ckpt"] is None:
            raise click.UsageError("Missing argument 'CKPT'.")
        if save_recipe is not None:
            _check_place(save_recipe, given["out"], given["force"])
        function(**given)
        if save_recipe is not None:
            _save(save_recipe, given)

    return wrapped


def _from_recipe(path: Path) -> dict[str, Any]:
    """Return what a recipe says of parameters that were not given themselves."""
    from eptc.recipes import Recipe

    context = click.get_current_context()
    values = Recipe.read(path).arguments
    if "verify" in values:
        values["no_verify"] = not values.pop("verify")
    explicit = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {
        name: value
        for name, value in values.items()
        if context.get_parameter_source(name) not in explicit
    }


def _save(path: Path, given: dict[str, Any]) -> None:
    from eptc.recipe_schema import keys
    from eptc.recipes import Recipe

    values = {**given, "verify": not given["no_verify"]}
    options = {name: values[name] for name in keys() if name in values}
    Recipe(options.pop("ckpt"), options.pop("out"), options).save(path)
    if not given["as_json"]:
        click.echo(f"{path}: the recipe of this build")


def _check_kept(path: Path, out: Path | None, force: bool) -> None:
    """Refuse to replace the folder that the recipe is in."""
    if force and out is not None and out.resolve() in path.resolve().parents:
        raise OutputError(
            f"the output folder {out} holds the recipe {path}, which --force would remove",
            expected="a place of its own",
            fix="name another folder with --out",
        )


def _check_place(path: Path, out: Path | None, force: bool) -> None:
    """Refuse a place for a recipe before anything is built; nothing of a user's is lost."""
    if path.exists() and not path.is_file():
        raise OutputError(
            f"the recipe {path} cannot be written: it is a "
            + ("folder" if path.is_dir() else "device"),
            expected="a file in a folder that is there",
        )
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"the recipe {path} cannot be written: there is no folder {path.parent}",
            expected="a file in a folder that is there",
        )
    if path.exists() and not force:
        raise OutputError(
            f"the recipe {path} is there already", fix="name another file, or pass --force"
        )
    folder = path.absolute().parent.resolve()  # the last part may be a link, which is replaced
    if out is not None and out.resolve() in (folder, *folder.parents):
        raise OutputError(
            f"the recipe {path} would be in the output folder, whose every file is listed",
            fix="name a file beside it",
        )


@click.group()
def recipe() -> None:
    """Check recipes, and say what they may hold."""


@recipe.command()
@click.argument("file", type=FOLDER)
@json_option
@command
def check(file: Path, as_json: bool) -> None:
    """Check FILE: its keys, and the types of their values; reads nothing else."""
    from eptc.recipes import Recipe

    found = Recipe.read(file).arguments
    if as_json:
        click.echo(json.dumps(found, default=str))
        return
    for name, value in found.items():
        click.echo(f"{name}: {value}")


@recipe.command()
@command
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from eptc.recipe_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
