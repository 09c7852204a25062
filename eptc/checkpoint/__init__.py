"""Checkpoint readers: a folder and its base model in, the adapter IR out."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Contents, ReadOptions, Routing, check_routing
from eptc.checkpoint.formats import FORMATS, Format, detect, find_format
from eptc.checkpoint.native import CONFIG as NATIVE_CONFIG
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.ir import AdaptedModel
from eptc.tasks import Task
from eptc.tensors import LazyTensor, content_hash

__all__ = [
    "FORMATS",
    "BaseModel",
    "Checkpoint",
    "Contents",
    "Format",
    "ReadOptions",
    "Routing",
    "detect",
    "find_format",
    "read",
    "read_task_spec",
]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, the base model it belongs to, and what the caller said of it."""

    path: Path
    base: BaseModel
    contents: Contents
    format: Format
    options: ReadOptions

    @functools.cached_property
    def sha256(self) -> str:
        """Content hash of the checkpoint's tensors, by their names on disk."""
        return content_hash(self.contents.tensors.values())

    @functools.cached_property
    def weights(self) -> Mapping[str, LazyTensor]:
        """The base's parameters by their names in the task model, those that it replaces too."""
        return {**self.base.weights, **self.contents.weights}

    @property
    def routed_tensors(self) -> list[LazyTensor]:
        """What routers that read the input, and their experts, are made of: about what stays."""
        base = {id(tensor) for tensor in self.weights.values()}
        found: dict[int, LazyTensor] = {}
        for adapter in self.contents.adapters.values():
            if (router := adapter.input_router) is not None:
                deltas = [tensor for b in adapter.branches for tensor in b.delta.tensors]
                found |= {id(tensor): tensor for tensor in (*router.tensors, *deltas)}
        return [tensor for key, tensor in found.items() if key not in base]

    @property
    def model(self) -> AdaptedModel:
        """The checkpoint in the adapter IR, all tasks still in it."""
        return AdaptedModel(
            config={**self.base.config, **self.contents.settings},
            weights=self.weights,
            adapters=self.contents.adapters,
            heads=self.contents.heads,
            tasks=self.contents.tasks,
            prompts=self.contents.prompts,
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


def read(
    path: Path,
    base: Path | None,
    *,
    top_k: int | None = None,
    tasks: Sequence[str] | None = None,
    task_spec: Path | None = None,
    specs: Mapping[str, Task] | None = None,
    allow_pickle: bool = False,
    format: str | None = None,
    routing: Routing = "exact",
) -> Checkpoint:
    """Read a checkpoint of any format and its base; no large tensor is read.

    Args:
        path: the checkpoint's folder.
        base: the base model's folder.
        top_k: experts a task uses, where the folder does not say.
        tasks: task names in the order of their ids, where the folder does not say.
        task_spec: a JSON file that describes tasks by prompt and labels.
        specs: such descriptions by name, where there is no file.
        allow_pickle: whether a `.bin` file may be read, weights only.
        format: a name of `FORMATS`, or of an installed format; None: what the folder looks like.
        routing: what is to become of routes that depend on the input.

    Raises:
        InputError: whatever is wrong with either folder or the options.
    """
    kind = detect(path) if format is None else find_format(format)
    if base is None:
        name = kind.base_name(path)
        raise OptionError(
            "no base model was given: adapters are of no use without it",
            expected="the folder of "
            + (f"the model that the checkpoint calls {name!r}" if name else "the model it was "
               "trained on"),
            fix="pass --base DIR",
        )  # fmt: skip
    if kind.describes_tasks and task_spec is not None:
        raise OptionError(
            f"--task-spec was given for a {kind.name} checkpoint, which describes its tasks "
            "itself",
            fix="leave it out, or edit the checkpoint's own description",
        )
    names = tuple(tasks) if tasks is not None else None
    described = read_task_spec(task_spec) if task_spec is not None else specs or {}
    options = ReadOptions(top_k, names, described, allow_pickle, routing)
    model = kind.read_base(base)
    contents = kind.read(path, model, options)
    if contents.routing.mode in ("static", "constant") and contents.prompts is None:
        check_routing(
            routing, ("exact",), f"{path}, in whose {kind.name} format no route reads the input"
        )
    return Checkpoint(path, model, contents, kind, options)


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
