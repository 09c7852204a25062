"""The targets that are no engines, by name, and the road to each."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eptc import bundle
from eptc.errors import OptionError
from eptc.fitting import check_fit, task_config
from eptc.interop.base import Folder, FolderJob, FolderTarget
from eptc.interop.genai import GenAi
from eptc.interop.hf import HuggingFace
from eptc.interop.lora import Lora
from eptc.job import Clock, Progress, read_source
from eptc.options import Options
from eptc.packs.export import TaskPack
from eptc.tasks import chosen, names_several

__all__ = ["COMMON", "FOLDER_TARGETS", "check_folder", "export_folder", "folder_target"]

FOLDER_TARGETS: dict[str, FolderTarget] = {
    target.name: target for target in (Lora(), HuggingFace(), GenAi())
}

# What every one of them takes: what is read, what of it, and whether it is proven.
COMMON = frozenset({
    "allow_pickle", "base", "format", "max_memory", "target", "task", "task_spec", "tasks",
    "top_k", "verify",
})  # fmt: skip


def folder_target(target: str, layout: str) -> FolderTarget | None:
    """Return what writes a folder that is no bundle of one engine; None where that is asked for.

    Args:
        target: what to write.
        layout: how.
    """
    return FOLDER_TARGETS.get(target, TaskPack() if layout == "pack" else None)


def export_folder(
    ckpt: str | Path, options: Options, *, out: str | Path, force: bool, progress: Progress
) -> Folder:
    """Write tasks of a checkpoint as a folder that is no engine.

    Args:
        ckpt: folder of the checkpoint.
        options: what is asked for: something that `folder_target` knows.
        out: a new or empty folder, or one to replace with `force`.
        force: replace what lies at `out`.
        progress: called with what is being done.

    Raises:
        InputError: something about the input; nothing was written.
        ParityError: what was written does not give the reference's answers; nothing was
            published.
    """
    target = folder_target(options.target, options.layout)
    assert target is not None
    check_folder(target, options)
    out, clock = Path(out), Clock(progress)
    bundle.check_place(out, force=force, inputs=options.inputs(ckpt))
    with clock.stage("read the checkpoint"):
        source = read_source(ckpt, options)
        task_ids = tuple(chosen(options.task, source.contents.tasks))
        for task_id in task_ids:
            check_fit(source, task_id, task_config(source, task_id))
    job = FolderJob(options, source, task_ids, names_several(options.task), clock, progress)
    with bundle.draft(out, force=force) as draft:
        folder = target.write(job, draft.path)
        draft.publish()
    notes = (*source.contents.notes, *folder.warnings)
    return dataclasses.replace(folder, path=draft.out, warnings=notes, seconds=clock.seconds)


def check_folder(target: FolderTarget, options: Options) -> None:
    """Raise OptionError for an option that means nothing to the target, or a bad value."""
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        if field.name in COMMON | target.takes or value in (None, field.default, [], ()):
            continue
        name = {"passes": "pass"}.get(field.name, field.name).replace("_", "-")
        shown = isinstance(value, str | int | float) and not isinstance(value, bool)
        said = f" {value}" if shown else ""
        raise OptionError(
            f"--{name}{said} was given together with {target.asked}",
            fix="leave one out",
        )
    target.check(options)
