"""All builds of a plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eptc.builds.checks import check_plan
from eptc.builds.inputs import Inputs, environment
from eptc.builds.local import run_local
from eptc.builds.on_ray import run_on_ray
from eptc.builds.one import Order
from eptc.builds.outcome import Outcome, Report
from eptc.builds.plan import BuildPlan
from eptc.errors import OptionError

__all__ = ["build_all", "make_orders"]


def build_all(
    plan: str | Path | BuildPlan,
    *,
    jobs: int = 1,
    ray: str | None = None,
    force: bool = False,
    progress: Callable[[Any], None] = lambda _: None,
    ended: Callable[[Outcome], None] = lambda _: None,
) -> Report:
    """Build everything a plan asks for; what is there, whole and of the same inputs, is kept.

    A build that fails does not stop the others, and leaves what was at its place. Who is killed
    half way can be started again; several may run at once, and share the work.

    Args:
        plan: a plan, or its file.
        jobs: builds at a time; above 1 each in a process of its own that imports the caller's main
            module anew, and that takes what `eptc.plan` says.
        ray: address of a Ray cluster to build on instead; empty: the one that `RAY_ADDRESS`
            names or that runs here, else a new one on this machine; None: no Ray. Its machines
            see the plan's files under the same paths, and have the same packages installed.
        force: replace what lies at a build's place although no plan built it.
        progress: called with what is being done.
        ended: called with the outcome of each build as it ends.

    Raises:
        InputError: something about the plan, or about one of its builds; nothing was built.
    """
    if jobs < 1:
        raise OptionError(f"--jobs is {jobs}", expected="1 or more")
    if ray is not None and jobs != 1:
        raise OptionError(
            f"--jobs {jobs} was given together with --ray, where each build takes a CPU",
            fix="leave one out",
        )
    if not isinstance(plan, BuildPlan):
        plan = BuildPlan.read(plan)
    progress("check every build")
    check_plan(plan, force=force)
    progress("hash what they read")
    orders = make_orders(plan, force=force)
    run = run_local(orders, jobs, progress) if ray is None else run_on_ray(orders, ray, progress)
    found: dict[str, Outcome] = {}
    for outcome in run:
        found[outcome.name] = outcome
        ended(outcome)
    return Report([found[build.name] for build in plan.builds])


def make_orders(plan: BuildPlan, *, force: bool = False) -> list[Order]:
    """Return the builds of a plan with the hashes of all they depend on."""
    inputs, here = Inputs(), environment()
    return [Order(build, plan.root, inputs.key(build), here, force) for build in plan.builds]
