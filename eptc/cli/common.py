"""What the commands of every group share: options, errors as exit codes, progress."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from eptc.errors import EptcError, MissingExtraError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from eptc.build import Event
    from eptc.run_passes import PassRecord

__all__ = [
    "FOLDER",
    "INTERRUPTED",
    "command",
    "fail",
    "json_option",
    "progress_shown",
    "source_options",
    "tensorrt_options",
    "with_options",
]

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED = 130
INTERNAL = 70
# What the system says of a name by itself, wherever it is looked up.
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
REPORT = (
    "This is a bug in eptc. Please report it with the output of `eptc doctor --json` and the "
    "traceback that EPTC_DEBUG=1 prints."
)


def fail(message: str, code: int, *, as_json: bool) -> None:
    """Print an error to standard error; with --json also as an object to standard output."""
    if as_json:
        click.echo(json.dumps({"error": message, "exit_code": code}))
    click.echo(f"eptc: error: {message}", err=True)
    sys.exit(code)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into messages and exit codes; no traceback for anything but a bug."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        import os

        as_json = bool(kwargs.get("as_json"))
        try:
            return function(*args, **kwargs)
        except EptcError as error:
            message = str(error)
            if error.exit_code == INTERNAL:
                message += f"\n{REPORT}"
            if os.environ.get("EPTC_DEBUG"):
                raise
            fail(message, error.exit_code, as_json=as_json)
        except ModuleNotFoundError as error:
            if os.environ.get("EPTC_DEBUG"):
                raise
            missing = MissingExtraError(
                f"the package {error.name!r} is not installed",
                expected="the compiler's packages",
                fix="pip install 'ept-compiler[compile]'",
            )
            fail(str(missing), missing.exit_code, as_json=as_json)
        except (KeyboardInterrupt, click.Abort):
            fail("interrupted; nothing was published", INTERRUPTED, as_json=as_json)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(INTERRUPTED)
        except MemoryError:
            fail("there is not enough memory; nothing was published", 2, as_json=as_json)
        except Exception as error:  # the last line of defence: a bug, said as one
            if os.environ.get("EPTC_DEBUG"):
                raise
            if isinstance(error, OSError) and error.errno in _NO_NAME:
                fail(f"{error.filename} cannot be used: {error.strerror}", 2, as_json=as_json)
            fail(f"{type(error).__name__}: {error}\n{REPORT}", INTERNAL, as_json=as_json)
        raise AssertionError  # fail exits

    return wrapped


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
FOLDER = click.Path(path_type=Path)


def with_options(
    function: Callable[..., Any], options: Sequence[Callable[..., Any]]
) -> Callable[..., Any]:
    """Return a command with options, in the order in which --help lists them."""
    for option in reversed(options):
        function = option(function)
    return function


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that reads a checkpoint."""
    options = (
        click.option("--base", type=FOLDER, help="Folder of the base model."),
        click.option(
            "--tasks",
            callback=_names,
            help="Task names in the order they were trained with, comma separated: what the "
            "released code's folders lack.",
        ),
        click.option(
            "--top-k", type=int, help="Experts a task uses: what those folders lack as well."
        ),
        click.option(
            "--task-spec",
            type=FOLDER,
            help="JSON file with prompts and labels of tasks that are not the published ones.",
        ),
        click.option("--allow-pickle", is_flag=True, help="Read .bin files (weights only)."),
        click.option(
            "--format",
            metavar="NAME",
            help="Format of the checkpoint, where its folder looks like none or like several; an "
            "installed package may have it.",
        ),
    )
    return with_options(function, options)


def tensorrt_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of what is built for TensorRT."""
    options = (
        click.option(
            "--profile",
            multiple=True,
            metavar="NAME=MIN:OPT:MAX",
            help="With --target tensorrt: sizes of a dimension that engines are built for, as "
            "batch=1:8:32; may be repeated. What is not named follows from the lengths of "
            "--probe, or has a default.",
        ),
        click.option(
            "--tensorrt-version",
            metavar="X.Y",
            help="With --target tensorrt: the version it is for. Without it: the newest whose "
            "operators are known.",
        ),
        click.option(
            "--build",
            is_flag=True,
            help="With --target tensorrt: build the engines here and prove them too; needs the "
            "package tensorrt and a GPU.",
        ),
    )
    return with_options(function, options)


def _names(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise OptionError(f"--tasks is {value!r}", expected="names separated by commas")
    return names


@contextlib.contextmanager
def progress_shown(as_json: bool, verbose: bool = False) -> Iterator[Callable[[Event], None]]:
    """Show stages and passes on a terminal or if asked to; stay quiet otherwise."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True, highlight=False)
    if as_json or not (console.is_terminal or verbose):
        yield lambda _: None
        return
    from eptc.build import Written

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    ) as bars:  # fmt: skip
        bar = bars.add_task("", total=None)

        def show(event: Event) -> None:
            if isinstance(event, str):
                bars.update(bar, description=event, total=None, completed=0)
                if not console.is_terminal:
                    console.print(event, soft_wrap=True)
            elif isinstance(event, Written):
                bars.update(bar, completed=event.done, total=event.total)
            else:
                _show_pass(console, event)

        yield show


def _show_pass(console: Console, record: PassRecord) -> None:
    sizes = ", ".join(
        f"{name} {before:,} -> {record.after[name]:,}"
        for name, before in record.before.items()
        if before != record.after[name]
    )
    error = "" if record.error is None else f"  {record.error:.2g} of its bound"
    origin = "" if record.origin is None else f"  {record.origin}"
    console.print(
        f"  {record.name:20s} {record.contract:6s} {record.seconds * 1e3:8.1f} ms{error}  {sizes}"
        f"{origin}",
        soft_wrap=True,
    )
