"""Targets that arrange engines in a folder as a server expects it, and the road to each."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from eptc import bundle
from eptc.errors import BundleError, InputError, OptionError, OutputError, TaskError
from eptc.interop.base import Folder
from eptc.interop.triton_config import LABELS, model_config, model_labels
from eptc.job import Clock, Progress, read_source
from eptc.options import Options
from eptc.precision import check_target
from eptc.run_passes import PassRecord
from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import file_name
from eptc.tasks import Task, chosen

__all__ = ["REPOSITORIES", "SEVERAL", "Built", "export_repository", "write_models"]

_VERSION = "1"
# The model whose rows name their task, beside one model for each.
SEVERAL = "multitask"


class Built(Protocol):
    """What is used of an `eptc.Bundle`."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What each pass did."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time by stage."""


def write_models(engine: Built, directory: Path, name: str) -> dict[str, Path]:
    """Arrange an engine as models of a Triton repository: one for each of its graphs.

    The folder of a model's version is the bundle, as it was proven: `Engine.load` and `verify`
    take it, Triton reads the graph that `config.pbtxt` names. An encoder and its decoder are two
    models, each with a copy of the weights, since ONNX Runtime reads no file outside a graph's
    folder.

    Args:
        engine: a bundle; its folder is moved away.
        directory: the repository.
        name: of the model; for one of several graphs `_` and its role are added.

    Returns:
        The models' folders, by role.
    """
    manifest = engine.manifest
    roles = list(manifest.graphs)
    folders = {role: directory / (name if len(roles) == 1 else f"{name}_{role}") for role in roles}
    for role, folder in folders.items():
        folder.mkdir()
        version = folder / _VERSION
        if role == roles[-1]:
            engine.path.rename(version)
        else:
            shutil.copytree(engine.path, version)
        config = model_config(folder.name, manifest, manifest.graphs[role])
        (folder / "config.pbtxt").write_text(config, "utf-8")
        if labels := model_labels(manifest):
            (folder / LABELS).write_text("".join(f"{label}\n" for label in labels), "utf-8")
    return folders


REPOSITORIES: dict[str, Callable[[Built, Path, str], dict[str, Path]]] = {"triton": write_models}


def export_repository(
    build: Callable[..., Built],
    ckpt: str | Path,
    options: Options,
    settings: Mapping[str, Any],
    *,
    out: str | Path,
    force: bool,
    progress: Progress,
) -> Folder:
    """Build engines, each proven as any other, and arrange them in one folder.

    One for each task and, where there are several, one whose rows name their task. Where the
    checkpoint or an option allows no such engine a warning says why.

    Args:
        build: builds one engine: `eptc.export`.
        ckpt: folder of the checkpoint.
        options: what is asked for; its target is one of `REPOSITORIES`.
        settings: arguments of `build` beside the checkpoint, the task and the place.
        out: a new or empty folder, or one to replace with `force`.
        force: replace what lies at `out`.
        progress: called with what is being done.

    Raises:
        InputError: something about the input; nothing was written.
        ParityError: an engine does not give the reference's answers; nothing was published.
    """
    if options.layout != "flat":
        raise OptionError(
            f"--layout {options.layout} was given together with --target {options.target}, which "
            "has a layout of its own",
            fix="leave one out",
        )
    check_target(options.precision, options.target)
    options.check_tensorrt()
    out, clock = Path(out), Clock(progress)
    bundle.check_place(out, force=force, inputs=options.inputs(ckpt))
    with clock.stage("read the checkpoint"):
        contents = read_source(ckpt, options).contents
        task_ids = chosen(options.task, contents.tasks)
        named: dict[str, int | list[int]] = dict(_named(contents.tasks, task_ids))
        tasks = tuple(named)
        if len(task_ids) > 1:
            named[SEVERAL] = task_ids
    seconds = collections.Counter(clock.seconds)
    passes: list[PassRecord] = []
    warnings: list[str] = []
    parity: dict[str, Any] = {}
    models: dict[str, Any] = {}
    with bundle.draft(out, force=force) as draft:
        for name, choice in named.items():
            # No task has this name: one that begins with a dot is no model's.
            place = draft.path / ".engine"
            try:
                engine = build(ckpt, **settings, task=choice, out=place, progress=progress)
            except InputError as error:
                if name != SEVERAL or isinstance(error, OutputError):
                    raise
                warnings.append(f"there is no model of several tasks: {error.found}")
                continue
            folders = REPOSITORIES[options.target](engine, draft.path, name)
            passes += engine.passes
            warnings += engine.warnings
            seconds.update(engine.seconds)
            parity[name] = dict(engine.manifest.parity)
            models[name] = {"models": [folder.name for folder in folders.values()]}
        bundle.write_json(
            draft.path / bundle.PROVENANCE,
            {
                "schema": 1, "target": options.target,
                "folders": sorted(
                    path.relative_to(draft.path).as_posix()
                    for path in draft.path.rglob("*") if path.is_dir()
                ),
            },
        )  # fmt: skip
        draft.publish()
    return Folder(
        draft.out, options.target, tasks, tuple(passes), tuple(dict.fromkeys(warnings)),
        dict(seconds), parity, models,
    )  # fmt: skip


def _named(tasks: tuple[Task, ...], task_ids: list[int]) -> Iterator[tuple[str, int]]:
    """Yield the name of each task's model, and its id."""
    taken = {SEVERAL: "the model of several tasks"} if len(task_ids) > 1 else {}
    for task_id in task_ids:
        name = tasks[task_id].name
        # Some file systems do not tell upper case from lower.
        other = taken.setdefault(name.lower(), name)
        try:
            if other != name or file_name(name, "a task").lower() == bundle.PROVENANCE:
                raise TaskError(f"no model beside {other} can be called {name!r}")
        except BundleError as error:
            raise TaskError(
                f"no model can be called {name!r}",
                expected="letters, digits, '.', '_' and '-'",
                fix="give the task another name in the checkpoint",
            ) from error
        yield name, task_id
