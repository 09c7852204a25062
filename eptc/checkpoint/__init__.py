"""Checkpoint readers: a folder and its base model in, the adapter IR out."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eptc.checkpoint.base import BaseModel, read_base
from eptc.checkpoint.contents import Contents
from eptc.checkpoint.native import CONFIG as NATIVE_CONFIG
from eptc.checkpoint.native import read_native
from eptc.checkpoint.released import CONFIG as RELEASED_CONFIG
from eptc.checkpoint.released import read_released
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.ir import AdaptedModel
from eptc.tasks import Task
from eptc.tensors import content_hash

__all__ = ["BaseModel", "Checkpoint", "Contents", "detect", "read", "read_task_spec"]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and the base model it belongs to."""

    path: Path
    base: BaseModel
    contents: Contents

    @functools.cached_property
    def sha256(self) -> str:
        """Content hash of the checkpoint's tensors, by their names on disk."""
        return content_hash(self.contents.tensors.values())

    @property
    def model(self) -> AdaptedModel:
        """The checkpoint in the adapter IR, all tasks still in it."""
        return AdaptedModel(
            config=self.base.config,
            weights=self.base.weights,
            adapters=self.contents.adapters,
            heads=self.contents.heads,
            tasks=self.contents.tasks,
        )

    def check_base(self) -> None:
        """Read the base once and check that it is the one the adapters were trained on.

        Raises:
            CheckpointError: another base, or numbers in it that are not finite.
        """
        wanted, found = self.contents.base_sha256, self.base.sha256
        if wanted is not None and wanted != found:
            raise CheckpointError(
                f"{self.path} was trained on another base model than {self.base.path}: the "
                f"weights' SHA-256 is {found[:16]}...",
                expected=f"{wanted[:16]}... ({self.contents.config['base'].get('name')})",
                fix="give that model with --base; if you know that this one is right, set "
                f"base.sha256 in {NATIVE_CONFIG} to null",
            )


def detect(path: Path) -> str:
    """Return which format a checkpoint folder has: `released` or `native`.

    Raises:
        CheckpointError: not a folder, neither format, or both.
    """
    if not path.is_dir():
        raise CheckpointError(f"the checkpoint {path} is not a folder")
    native, released = (path / NATIVE_CONFIG).is_file(), (path / RELEASED_CONFIG).is_file()
    if native and released:
        raise CheckpointError(
            f"{path} has both {NATIVE_CONFIG} and {RELEASED_CONFIG}", fix="remove one of them"
        )
    if native or released:
        return "native" if native else "released"
    runs = sorted(p.name for p in path.glob("checkpoint-*") if p.is_dir())
    raise CheckpointError(
        f"{path} has neither {NATIVE_CONFIG} nor {RELEASED_CONFIG}",
        expected="a native checkpoint or a folder of the released EPT code",
        fix=f"name one of its checkpoints, such as {path / runs[-1]}" if runs else None,
    )


def read(
    path: Path,
    base: Path | None,
    *,
    top_k: int | None = None,
    tasks: Sequence[str] | None = None,
    task_spec: Path | None = None,
    specs: Mapping[str, Task] | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Read a checkpoint of either format and its base; no large tensor is read.

    Args:
        path: the checkpoint's folder.
        base: the base model's folder.
        top_k: experts a task uses, where the folder does not say.
        tasks: task names in the order of their ids, where the folder does not say.
        task_spec: a JSON file that describes tasks by prompt and labels.
        specs: such descriptions by name, where there is no file.
        allow_pickle: whether a `.bin` file may be read, weights only.

    Raises:
        InputError: whatever is wrong with either folder or the options.
    """
    kind = detect(path)
    if base is None:
        raise OptionError(
            "no base model was given: adapters are of no use without it",
            expected=f"the folder of {_base_name(path, kind)}",
            fix="pass --base DIR",
        )
    if kind == "native" and task_spec is not None:
        raise OptionError(
            "--task-spec was given for a native checkpoint, which describes its tasks itself",
            fix=f"leave it out, or edit {path / NATIVE_CONFIG}",
        )
    model = read_base(base)
    names = tuple(tasks) if tasks is not None else None
    if kind == "native":
        contents = read_native(path, model, top_k=top_k, tasks=names)
    else:
        specs = read_task_spec(task_spec) if task_spec is not None else specs or {}
        contents = read_released(
            path, model, top_k=top_k, tasks=names, task_specs=specs, allow_pickle=allow_pickle
        )
    return Checkpoint(path, model, contents)


def _base_name(path: Path, kind: str) -> str:
    """What the checkpoint itself calls its base, as far as it can be read."""
    try:
        config = json.loads(
            (path / (NATIVE_CONFIG if kind == "native" else RELEASED_CONFIG)).read_text()
        )
        name = (
            config["base"].get("name") if kind == "native" else config["base_model_name_or_path"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        name = None
    return (
        f"the model that the checkpoint calls {name!r}" if name else "the model it was trained on"
    )


def read_task_spec(path: Path) -> dict[str, Task]:
    """Return the tasks described in a JSON file, by name: a list, or {"tasks": [...]}.

    Raises:
        TaskError: not such a file, or a task described twice.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"the task description {path} cannot be read: {error}") from error
    entries = data.get("tasks") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise TaskError(f"{path} holds no list of tasks", expected='{"tasks": [{"name": ...}]}')
    tasks = [Task.from_json(entry) for entry in entries]
    specs = {task.name: task for task in tasks}
    if len(specs) != len(tasks):
        raise TaskError(f"{path} describes a task twice")
    return specs
