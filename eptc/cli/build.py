"""`eptc build`: everything a plan asks for."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eptc.cli.common import FOLDER, INTERRUPTED, command, fail, json_option, progress_shown

if TYPE_CHECKING:
    from eptc.builds import BuildPlan, Outcome, Report

__all__ = ["build"]


@click.command()
@click.argument("plan", type=FOLDER)
@click.option("--jobs", type=int, default=1, show_default=True, help="Builds at a time, here.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Build on a Ray cluster, whose machines see the same files; without ADDRESS (put it "
    "last then): the one that RAY_ADDRESS names or that runs here, else a new one here.",
)
@click.option(
    "--dry-run", is_flag=True, help="Check the plan, say what would be built, write nothing."
)
@click.option(
    "--force", is_flag=True, help="Replace what lies at a place though no plan built it."
)
@click.option("-v", "--verbose", is_flag=True, help="Show stages and passes in a pipe as well.")
@json_option
@command
def build(
    plan: Path, dry_run: bool, force: bool, verbose: bool, as_json: bool, **options: Any
) -> None:
    """Build every combination of tasks, precisions, targets that the TOML file PLAN asks for.

    What is there already, whole and of the same inputs, is kept; so a build that was killed is
    started again with the same command. One that fails does not stop the others.

    Exit codes: 1 where an engine failed its gate, 2 for bad input. What is wrong with the plan is
    said before anything is built.
    """
    from eptc.builds import BuildPlan, build_all

    read = BuildPlan.read(plan)
    if dry_run:
        _print_orders(read, force, as_json)
        return
    try:
        # Ray prints to standard output what happens on a cluster; that is the report's alone.
        with progress_shown(as_json, verbose) as progress, contextlib.redirect_stdout(sys.stderr):
            report = build_all(
                read, force=force, progress=progress, ended=_quiet if as_json else _say, **options
            )
    except KeyboardInterrupt:
        said = "interrupted; what was built stays, and is kept next time"
        fail(said, INTERRUPTED, as_json=as_json)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        _print_table(report)
    sys.exit(report.exit_code)


def _quiet(_: Outcome) -> None:
    """Say nothing."""


def _say(outcome: Outcome) -> None:
    """Say as it happens how a build ended."""
    click.echo(f"{outcome.name}: {outcome.state}", err=True)
    for warning in outcome.warnings:
        click.echo(f"eptc: warning: {outcome.name}: {warning}", err=True)
    if outcome.error is not None:
        click.echo(f"eptc: error: {outcome.name}: {outcome.error}", err=True)


def _print_orders(plan: BuildPlan, force: bool, as_json: bool) -> None:
    """Print what a plan would build."""
    from eptc.builds.checks import check_plan
    from eptc.builds.run import make_orders

    check_plan(plan, force=force)
    states = {o.build.name: "keep" if o.done else "build" for o in make_orders(plan)}
    if as_json:
        builds = [{"name": name, "would": state} for name, state in states.items()]
        click.echo(json.dumps({"root": str(plan.root), "builds": builds}))
        return
    for name, state in states.items():
        click.echo(f"{state} {plan.root / name}")


def _print_table(report: Report) -> None:
    from eptc.tables import print_builds

    print_builds(report)
