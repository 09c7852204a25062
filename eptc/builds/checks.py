"""What is wrong with a plan is said before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from eptc import bundle
from eptc.builds.plan import Build, BuildPlan
from eptc.builds.state import Place
from eptc.errors import InputError, OptionError, OutputError
from eptc.fitting import check_fit, task_config
from eptc.interop.targets import FOLDER_TARGETS, check_folder, folder_target
from eptc.interop.triton import REPOSITORIES
from eptc.job import Job, read_source
from eptc.options import Options
from eptc.plugins import installed
from eptc.similar_names import did_you_mean
from eptc.targets import TARGETS
from eptc.tasks import chosen

__all__ = ["check_plan"]


def check_plan(plan: BuildPlan, *, force: bool) -> None:
    """Check every build of a plan; configurations and shapes are read, no weight is.

    Args:
        plan: the plan.
        force: whether folders may be replaced that no plan built.

    Raises:
        InputError: a build that cannot be, by name: an unknown task, precision or target, options
            that contradict each other, a file that is not there, a place that is taken.
    """
    for build in plan.builds:
        try:
            _check(build)
            _check_place(plan, build, force)
        except InputError as error:
            raise type(error)(
                f"{build.name}: {error.found}", expected=error.expected, fix=error.fix
            ) from error


def _check(build: Build) -> None:
    options = Options(**build.recipe.options)
    known = [*TARGETS, *FOLDER_TARGETS, *REPOSITORIES]
    known += [plugin.name for plugin in installed("eptc.targets")]
    if options.target not in known:
        raise OptionError(
            f"the target is {options.target!r}{did_you_mean(options.target, known)}",
            expected=" or ".join(known),
        )
    for what, path in options.inputs(build.ckpt).items():
        if path is not None and not Path(path).exists():
            raise OptionError(f"{what} is not there: {path}")
    folder = folder_target(options.target, options.layout)
    if folder is not None:
        check_folder(folder, options)
        source = read_source(build.ckpt, options)
        for task_id in chosen(options.task, source.contents.tasks):
            check_fit(source, task_id, task_config(source, task_id))
        return
    for engine in _engines(build.ckpt, options):
        Job.read(build.ckpt, engine)


def _engines(ckpt: Path, options: Options) -> Iterator[Options]:
    """Yield the options of each engine of a build, but of one that may as well be left out."""
    if options.target not in REPOSITORIES:
        yield options
        return
    one = dataclasses.replace(options, target="onnx")
    for task_id in chosen(options.task, read_source(ckpt, one).contents.tasks):
        yield dataclasses.replace(one, task=task_id)


def _check_place(plan: BuildPlan, build: Build, force: bool) -> None:
    inputs = Options(**build.recipe.options).inputs(build.ckpt) | {"the plan": plan.path}
    ours = Place(plan.root, build.name).read() is not None
    bundle.check_place(build.out, force=force or ours, inputs=inputs)
    for what, path in inputs.items():
        if path is not None and Path(path).is_dir() and _inside(build.out, Path(path)):
            raise OutputError(
                f"the output folder {build.out} is in {what}, which would be another then",
                expected="a place of its own",
            )


def _inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents
