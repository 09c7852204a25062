"""Every format of checkpoints by its name: how it is recognised, read, and run in PyTorch."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from eptc.checkpoint.base import BaseModel, read_base, read_json
from eptc.checkpoint.contents import Contents, ReadOptions
from eptc.checkpoint.lora import read_lora
from eptc.checkpoint.mept import read_mept
from eptc.checkpoint.mept_base import prompted_base
from eptc.checkpoint.mept_files import has_state_dict
from eptc.checkpoint.mept_settings import NEEDS, TRAINING, is_mept
from eptc.checkpoint.native import CONFIG as NATIVE_CONFIG
from eptc.checkpoint.native import read_config, read_native
from eptc.checkpoint.peft_folder import CONFIG, peft_type, tensor_names
from eptc.checkpoint.released import read_released
from eptc.checkpoint.tucka import holds_unmerged, read_tucka
from eptc.errors import CheckpointError, OptionError
from eptc.plugins import Plugin
from eptc.tasks import Task

if TYPE_CHECKING:
    from eptc.nn.adapted import ReferenceModel
    from eptc.nn.streamed import StreamedModel

__all__ = ["FORMATS", "Format", "detect", "find_format"]


class Format(abc.ABC):
    """A format of checkpoints.

    `read` and `reference` are two roads from the same files that share no code: the parity gate
    compares what comes of the one with the other.

    Attributes:
        name: what `--format` and the manifest call it.
        describes_tasks: whether its folders describe their tasks, so that nobody else may.
        plugin: the entry point it comes from; None: eptc's own.
    """

    name: str
    describes_tasks = False
    plugin: Plugin | None = None

    @abc.abstractmethod
    def matches(self, path: Path) -> bool:
        """Whether a folder is of this format, as far as a glance tells."""

    def read_base(self, path: Path) -> BaseModel:
        """Return the base model's folder; raise BaseModelError where it cannot be used."""
        return read_base(path)

    @abc.abstractmethod
    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Return what a folder holds, no large tensor read; raise InputError where it is wrong."""

    @abc.abstractmethod
    def reference(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> ReferenceModel:
        """Return the checkpoint on its base in PyTorch, in eval mode.

        Args:
            path: the checkpoint's folder.
            base: the base model's folder.
            options: as the caller gave them, not as the reader understood them.
            tasks: what the tasks look like.
        """

    def stream(
        self,
        path: Path,
        base: Path,
        options: ReadOptions,  # noqa: ARG002  # the interface
        tasks: Sequence[Task],  # noqa: ARG002
    ) -> StreamedModel:
        """Return the same on a base that stays on disk, for models larger than memory.

        Raises:
            OptionError: this format has no such reference.
        """
        raise OptionError(
            f"a {self.name} checkpoint is verified as a whole model, which does not fit into "
            f"memory: {path} on {base}",
            fix="build it where there is more memory, or give --no-verify, which the manifest "
            "records",
        )

    def blamed(self, what: str) -> AbstractContextManager[None]:  # noqa: ARG002  # the interface
        """Say whose an unexpected error is, where the format is not eptc's own."""
        return contextlib.nullcontext()

    def base_name(self, path: Path) -> str | None:
        """Return what a checkpoint calls its base, as far as it says."""
        try:
            name = read_json(path / CONFIG, CheckpointError).get("base_model_name_or_path")
        except CheckpointError:
            return None
        return name if isinstance(name, str) else None


class _Ept(Format):
    """What native and released folders share: the same PyTorch model."""

    def reference(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> ReferenceModel:
        from eptc.nn import load_reference

        return load_reference(
            path, base, top_k=options.top_k, tasks=_described(options, tasks),
            allow_pickle=options.allow_pickle,
        )  # fmt: skip

    def stream(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> StreamedModel:
        from eptc.nn.streamed import stream_reference

        return stream_reference(
            path, base, top_k=options.top_k, tasks=_described(options, tasks),
            allow_pickle=options.allow_pickle,
        )  # fmt: skip


def _described(options: ReadOptions, tasks: Sequence[Task]) -> list[str | Task] | None:
    """Return the tasks in the caller's order, so that a reader that mixes them up is found out."""
    described = {task.name: task for task in tasks}
    if options.tasks is None:
        return None
    return [described.get(name, name) for name in options.tasks]


class Native(_Ept):
    """eptc's own: `ept_config.json` and `ept_model.safetensors`."""

    name = "native"
    describes_tasks = True

    def matches(self, path: Path) -> bool:
        """Whether there is an `ept_config.json`."""
        return (path / NATIVE_CONFIG).is_file()

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Read it (`eptc.checkpoint.native`)."""
        return read_native(path, base, options)

    def stream(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> StreamedModel:
        """Return it on a base that stays on disk, where its routers read the task."""
        if read_config(path)["gate"]["router_input"] != "task":
            # Rows whose routes are within rounding would have to be left out block by block.
            return Format.stream(self, path, base, options, tasks)
        return super().stream(path, base, options, tasks)

    def base_name(self, path: Path) -> str | None:
        """Return what the configuration calls the base."""
        try:
            name = read_json(path / NATIVE_CONFIG, CheckpointError)["base"].get("name")
        except (CheckpointError, KeyError, TypeError, AttributeError):
            return None
        return name if isinstance(name, str) else None


class Released(_Ept):
    """The authors' released EPT code: a PEFT LoRA with experts and gates."""

    name = "released"

    def matches(self, path: Path) -> bool:
        """Whether it is a PEFT LoRA that is not a plain one, or does not say what it is."""
        return peft_type(path) in ("LORA", "") and not _plain(path)

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Read it (`eptc.checkpoint.released`)."""
        return read_released(path, base, options)


class Lora(Format):
    """A stock PEFT LoRA adapter."""

    name = "lora"

    def matches(self, path: Path) -> bool:
        """Whether it is a PEFT LoRA without experts."""
        return peft_type(path) == "LORA" and _plain(path)

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Read it (`eptc.checkpoint.lora`)."""
        return read_lora(path, base, options)

    def reference(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> ReferenceModel:
        """Return it (`eptc.nn.lora`)."""
        from eptc.nn.lora import load_lora

        return load_lora(path, base, task=tasks[0], allow_pickle=options.allow_pickle)

    def stream(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> StreamedModel:
        """Return it (`eptc.nn.lora`)."""
        from eptc.nn.lora import stream_lora

        return stream_lora(path, base, task=tasks[0], allow_pickle=options.allow_pickle)


class Tucka(Format):
    """The TuckA authors' code: a PEFT adapter of a type of its own."""

    name = "tucka"

    def matches(self, path: Path) -> bool:
        """Whether it is a TuckA adapter, or a model that it was never merged into."""
        return peft_type(path) == "TUCKA" or holds_unmerged(path)

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Read it (`eptc.checkpoint.tucka`)."""
        return read_tucka(path, base, options)

    def reference(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> ReferenceModel:
        """Return it (`eptc.nn.tucka`)."""
        from eptc.nn.tucka import TuckaModel

        return TuckaModel.load(
            path, base, task=tasks[0], allow_pickle=options.allow_pickle,
            routing="per-sample" if options.routing == "per-sample" else "batch",
        )  # fmt: skip


class Mept(Format):
    """Prompts before the text, mixed by routers: MEPT, and SMoP."""

    name = "mept"

    def matches(self, path: Path) -> bool:
        """Whether its settings name one of the two methods."""
        return is_mept(path)

    def read_base(self, path: Path) -> BaseModel:
        """Return the base: a T5, or a Llama as a classifier."""
        return prompted_base(read_base(path))

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Read it (`eptc.checkpoint.mept`)."""
        return read_mept(path, base, options)

    def reference(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> ReferenceModel:
        """Return it (`eptc.nn.mept`)."""
        from eptc.nn.mept import MeptModel

        return MeptModel.load(
            path, base, task=tasks[0], top_k=options.top_k,
            mode="per-sample" if options.routing == "per-sample" else "batch",
            allow_pickle=options.allow_pickle,
        )  # fmt: skip


def _plain(path: Path) -> bool:
    """Whether an adapter has low ranks and no experts."""
    names = tensor_names(path)
    return any(".lora_A" in name or ".lora_embedding_A" in name for name in names) and not any(
        ".lora_expert_kernels." in name or ".lora_gate." in name for name in names
    )


# In the order in which they are asked.
FORMATS: dict[str, Format] = {
    entry.name: entry for entry in (Native(), Released(), Lora(), Tucka(), Mept())
}


def find_format(name: str) -> Format:
    """Return a format by its name: one of eptc's own, else an installed one.

    Raises:
        OptionError: there is none of that name.
        PluginError: the package that has it cannot be used.
    """
    if name in FORMATS:
        return FORMATS[name]
    from eptc.checkpoint.installed import find_installed, installed_names

    found = find_installed(name)
    if found is None:
        raise OptionError(
            f"the format is {name!r}", expected=" or ".join([*FORMATS, *installed_names()])
        )
    return found


def detect(path: Path) -> Format:
    """Return which format a checkpoint folder has; installed ones are asked last.

    Raises:
        CheckpointError: not a folder, of no format, or of several.
    """
    if not path.is_dir():
        raise CheckpointError(f"the checkpoint {path} is not a folder")
    found = [entry for entry in FORMATS.values() if entry.matches(path)]
    unusable: list[str] = []
    if not found:
        from eptc.checkpoint.installed import matching

        found, unusable = matching(path)
    if len(found) > 1:
        names = [entry.name for entry in found]
        raise CheckpointError(
            f"{path} looks like several formats: {', '.join(names)}",
            fix=f"say which with --format {names[0]}, or remove the other's files",
        )
    if found:
        return found[0]
    from eptc.checkpoint.installed import installed_names

    inside = [c.parent for depth in ("*", "*/*") for c in path.glob(f"{depth}/{CONFIG}")]
    kind = peft_type(path)
    what = (
        f"{path} has neither {NATIVE_CONFIG} nor {CONFIG}"
        if kind is None
        else f"{path / CONFIG} has the peft_type {kind!r}, which no format reads"
    )
    fix = f"name one of its checkpoints, such as {max(inside)}" if inside else None
    if kind is None and ((path / TRAINING).is_file() or has_state_dict(path)):
        what += f", and no {TRAINING} that names a method of prompts"
        fix = f"where it holds prompts (MEPT, SMoP): add {NEEDS}; or pass --format mept"
    raise CheckpointError(
        "\n".join([what, *unusable]),
        expected="a folder of one of the formats " + ", ".join([*FORMATS, *installed_names()]),
        fix=fix,
    )
