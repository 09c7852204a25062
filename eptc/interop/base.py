"""What every target is that writes a folder which is no engine: files for other programs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from eptc import bundle
from eptc.checkpoint import Checkpoint
from eptc.describe import checkpoint_entry, tool_versions
from eptc.job import Clock, Progress
from eptc.options import Options
from eptc.run_passes import PassRecord
from eptc.tasks import Task

__all__ = ["Folder", "FolderJob", "FolderTarget", "write_provenance"]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A published folder that is no engine.

    Args:
        path: the folder.
        target: what wrote it.
        tasks: names of its tasks.
        passes: what each pass did, task by task.
        warnings: what a user should know although nothing failed.
        seconds: wall time by stage.
        parity: what was compared, by task: JSON values.
        details: what else there is to say of each task, likewise.
    """

    path: Path
    target: str
    tasks: tuple[str, ...]
    passes: tuple[PassRecord, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    parity: Mapping[str, Any]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class FolderJob:
    """What a target is asked to write; everything was read, no weight was.

    Args:
        options: what the caller asked for.
        source: the checkpoint.
        task_ids: the tasks, in the order they are named in.
        several: whether the caller asked for several, however many those are.
        clock: counts the time of each stage.
        progress: called with what is being done.
    """

    options: Options
    source: Checkpoint
    task_ids: tuple[int, ...]
    several: bool
    clock: Clock
    progress: Progress

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks."""
        return tuple(self.source.contents.tasks[task_id] for task_id in self.task_ids)


class FolderTarget(abc.ABC):
    """A target that is no engine.

    Attributes:
        name: what `--target` calls it.
        takes: options it understands beside those that say what is read and where it goes.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]]

    @property
    def asked(self) -> str:
        """How it is asked for, and why other options mean nothing then."""
        return f"--target {self.name}, which writes no engine"

    @abc.abstractmethod
    def check(self, options: Options) -> None:
        """Raise OptionError for a value no such folder can have; nothing was read."""

    @abc.abstractmethod
    def write(self, job: FolderJob, directory: Path) -> Folder:
        """Write everything, proven; what is written is published when this returns.

        Args:
            job: what is asked for.
            directory: an empty folder, which is not the one it will be published at.

        Returns:
            What was written; the caller sets `path` and `seconds`.

        Raises:
            InputError: something about the input.
            ParityError: what was written does not give the reference's answers.
        """


def write_provenance(
    directory: Path,
    job: FolderJob,
    task_ids: Sequence[int],
    *,
    target: str,
    passes: Sequence[PassRecord],
    parity: Mapping[str, Any],
    tools: Sequence[str] = (),
    **more: Any,
) -> None:
    """Write what a folder was made from: no path, no clock, so that two builds are equal.

    Args:
        directory: its files are complete.
        job: what was asked for.
        task_ids: the tasks in it.
        target: what wrote it.
        passes: what each pass did.
        parity: what was compared.
        tools: packages whose versions matter, beside those that always do.
        more: further JSON values.
    """
    source, plugin = job.source, job.source.format.plugin
    bundle.write_json(
        directory / bundle.PROVENANCE,
        {
            "schema": 1,
            "target": target,
            "tasks": [source.contents.tasks[task_id].to_json() for task_id in task_ids],
            "checkpoint": checkpoint_entry(source),
            "base": {
                "model_type": source.base.config["model_type"],
                "sha256": source.base.sha256,
            },
            **more,
            "passes": [record.to_json() for record in passes],
            "parity": dict(parity),
            "tools": tool_versions(tools, [] if plugin is None else [plugin]),
            "files": {
                name: dataclasses.asdict(record)
                for name, record in bundle.file_records(directory).items()
            },
        },
    )
