"""Add tasks to a pack and remove them; its base, its graphs and its other tasks stay as they are.

One change at a time: each holds a lock on the pack's folder. A task's file is written, proven and
synced before the manifest that lists it takes the old one's place by one rename, and goes after
the manifest that no longer does. Whatever is killed in between leaves a file that no manifest
lists, which the next change removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir

from eptc import bundle, checkpoint
from eptc.errors import OutputError, TaskError
from eptc.files import sync
from eptc.fitting import check_fit, task_config
from eptc.job import Progress
from eptc.packs.export import pack_gate, proven
from eptc.packs.fit import check_base, check_config, check_inputs, check_shared, check_tokenizer
from eptc.packs.task import (
    ADAPTER,
    adapter_file,
    check_factors,
    describe_task,
    factor,
    task_tensors,
    write_adapter,
)
from eptc.runtime.pack_manifest import PackManifest, read_pack
from eptc.runtime.seal import sealed
from eptc.runtime.spec import PACK
from eptc.tasks import chosen, names_several
from eptc.text import find_tokenizer

__all__ = ["add_task", "remove_task"]

# The manifest that is about to take the old one's place.
_NEXT = f"{PACK}.next"


def add_task(
    pack: str | Path,
    ckpt: str | Path,
    *,
    task: str | int | None = None,
    name: str | None = None,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    allow_pickle: bool = False,
    format: str | None = None,
    max_memory: int | None = None,
    verify: bool = True,
    progress: Progress = lambda _: None,
) -> PackManifest:
    """Add a task of a checkpoint to a pack, proven as it will be served.

    Args:
        pack: the pack's folder.
        ckpt: folder of a checkpoint of any format over the pack's base.
        task: the task's name there, an alias of it, or its id; None where there is one.
        name: what it is called in the pack; None: its name.
        base: folder of the base model.
        tasks: task names in id order, where the checkpoint does not store them.
        top_k: experts a task uses, where the checkpoint does not store it.
        task_spec: JSON file with prompts and labels.
        allow_pickle: read `.bin` files (weights only).
        format: of the checkpoint; None: what its folder looks like.
        max_memory: bytes that this process may have resident; None: what is available.
        verify: False adds a task nobody compared with anything; the manifest says so.
        progress: called with what is being done.

    Returns:
        The pack's manifest.

    Raises:
        InputError: the pack or the checkpoint cannot be used, or they do not go together.
        ParityError: the task does not give the reference's answers. The pack is as it was.
    """
    folder = Path(pack)
    progress("wait for others who change the pack")
    with _changing(folder) as change:
        manifest = change.manifest
        progress("hash the pack")
        check_shared(folder, manifest)
        progress("read the checkpoint")
        source = checkpoint.read(
            Path(ckpt), None if base is None else Path(base), top_k=top_k, tasks=tasks,
            task_spec=None if task_spec is None else Path(task_spec),
            allow_pickle=allow_pickle, format=format,
        )  # fmt: skip
        task_id = _one(task, source)
        described = source.contents.tasks[task_id]
        name = described.name if name is None else name
        _check_free(folder, manifest, name)
        check_factors(source)
        progress("hash and check the base model")
        check_base(folder, manifest, source)
        config = task_config(source, task_id)
        check_config(folder, config.to_dict())
        check_fit(source, task_id, config)
        tokenizer = find_tokenizer(source.path, source.base.path)
        check_tokenizer(folder, manifest, tokenizer)
        gate = pack_gate(source, max_memory) if verify else None
        factored = factor(source, task_id, gate, progress)
        check_inputs(folder, manifest, source, factored)
        graphs = {role: onnx_ir.load(folder / s.file) for role, s in manifest.graphs.items()}
        files = [*manifest.files, *(entry.file for entry in manifest.tasks.values())]
        with change.new_file(adapter_file(name, files)) as path:
            tensors = task_tensors(factored, manifest.heads)
            write_adapter(path, tensors)
            entry, _ = describe_task(
                source, factored, tensors, path, graphs, tokenizer,
                optimize_for=manifest.optimized_for,
            )  # fmt: skip
            manifest = dataclasses.replace(manifest, tasks={**manifest.tasks, name: entry})
            if gate is not None:
                manifest = proven(gate, folder, manifest, name, factored, progress)
            progress("publish")
            change.publish(manifest)
    return manifest


def remove_task(pack: str | Path, name: str) -> PackManifest:
    """Remove a task from a pack; return the pack's manifest.

    Who has loaded the pack goes on answering for the tasks it uses.

    Args:
        pack: the pack's folder.
        name: the task's name there.

    Raises:
        BundleError: not a pack.
        OutputError: it cannot be written.
        TaskError: there is no such task, or it is the last.
    """
    folder = Path(pack)
    with _changing(folder) as change:
        manifest = change.manifest
        if name not in manifest.tasks:  # nor an alias: what is removed is called by its name
            raise TaskError(
                f"there is no task {name!r} in the pack {folder}",
                expected=", ".join(manifest.tasks),
            )
        if len(manifest.tasks) == 1:
            raise TaskError(
                f"{name!r} is the last task of the pack {folder}",
                fix="remove the folder, or add another task first",
            )
        entry = manifest.tasks[name]
        left = {other: e for other, e in manifest.tasks.items() if other != name}
        manifest = dataclasses.replace(manifest, tasks=left)
        change.publish(manifest)
        (folder / entry.file).unlink(missing_ok=True)
    return manifest


@dataclasses.dataclass(frozen=True)
class _Change:
    """A pack that this process alone may change.

    Args:
        folder: the pack's folder.
        manifest: as it was found.
        lock: the open folder, locked.
    """

    folder: Path
    manifest: PackManifest
    lock: int

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Yield the path of a file to write; it goes unless a manifest was published."""
        try:
            yield self.folder / name
        except BaseException:
            # In the folder that is locked: another in its place has files of its own.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.lock)
            raise

    def publish(self, manifest: PackManifest) -> None:
        """Put a manifest in the place of the old one in one step, new files synced before."""
        self._check_place()
        for name in manifest.tasks.keys() - self.manifest.tasks.keys():
            sync(self.folder / manifest.tasks[name].file)
        following = self.folder / _NEXT
        try:
            bundle.write_json(following, sealed(manifest.to_json()))
            sync(following)
            self._check_place()
            following.replace(self.folder / PACK)
        except BaseException:
            following.unlink(missing_ok=True)
            raise
        sync(self.folder)

    def _check_place(self) -> None:
        """Raise OutputError where another folder was put in the place of the locked one."""
        if not os.path.samestat(os.fstat(self.lock), self.folder.stat()):
            raise OutputError(
                f"{self.folder} was replaced while it was changed",
                fix="try again with the new one",
            )


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[_Change]:
    """Lock a pack, waiting for who changes it now, and remove what killed changes left.

    Raises:
        BundleError: not a pack.
        OutputError: it cannot be locked or written.
    """
    read_pack(folder)  # what is no pack is not locked
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        manifest = read_pack(folder)  # another may have changed it meanwhile
        listed = {entry.file for entry in manifest.tasks.values()} | set(manifest.files)
        for path in (*folder.glob(f"*{ADAPTER}"), folder / _NEXT):
            if path.name not in listed:
                path.unlink(missing_ok=True)
        yield _Change(folder, manifest, lock)
    except OSError as error:
        if error.errno in bundle.NO_PLACE:
            raise _cannot_write(folder, error) from error
        raise
    finally:
        os.close(lock)


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the pack {folder} cannot be changed: {error.strerror or error}",
        expected="a folder that this user may write to, with room, on a file system with locks",
        fix="the pack is as it was",
    )


def _one(task: str | int | None, source: checkpoint.Checkpoint) -> int:
    """Return the id of the one task that is meant."""
    if names_several(task):
        raise TaskError(f"several tasks were chosen: {task!r}", fix="add one after the other")
    return chosen(task, source.contents.tasks)[0]


def _check_free(folder: Path, manifest: PackManifest, name: str) -> None:
    if name in manifest.tasks:
        raise TaskError(
            f"the pack {folder} has a task {name!r} already",
            fix="call the new one otherwise (--as), or remove the old one first (`eptc pack "
            "remove`)",
        )
    for other, entry in manifest.tasks.items():
        if name.lower() in map(str.lower, entry.task.aliases):
            raise TaskError(
                f"{name!r} is an alias of the task {other!r} of the pack {folder}: who asks for "
                "it would be answered by another task from now on",
                fix="call the new one otherwise (--as)",
            )
    if not name:
        raise TaskError("a task is to be called ''", expected="a non-empty name")
