"""Write a bundle: into a hidden sibling first, then published by one rename.

A build that is killed leaves only the sibling, which holds no manifest under a bundle's name;
the next build into the same place recognises it by its name and by its free lock, and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eptc.errors import OutputError
from eptc.files import sha256, sync, unfinished
from eptc.runtime.manifest import Manifest
from eptc.runtime.seal import sealed
from eptc.runtime.spec import MANIFEST, FileRecord

__all__ = [
    "NO_PLACE",
    "PROVENANCE",
    "Draft",
    "check_place",
    "draft",
    "file_records",
    "share",
    "write_json",
    "write_manifest",
    "written_by",
]

# In every folder written that is no bundle: what it was made from; of a folder of folders, which.
PROVENANCE = "eptc.json"

# What the system says where a folder cannot be written, or is taken by now.
NO_PLACE = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.ENOSPC,
    errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
)  # fmt: skip

_ROOM = "a place with enough room that this user may write to"


@dataclasses.dataclass
class Draft:
    """A folder that is being written; nothing of it is visible at the output's place.

    Args:
        path: the folder to write into.
        out: the place it will be published at.
        force: whether what lies there may be replaced.
    """

    path: Path
    out: Path
    force: bool

    def publish(self) -> None:
        """Move the folder to its place in one step.

        Raises:
            OutputError: the place is taken.
        """
        for file in self.path.rglob("*"):
            sync(file)
        sync(self.path)
        check_place(self.out, force=self.force)
        try:
            self.path.rename(self.out)  # replaces an empty folder
        except OSError as error:
            # Somebody else's bundle may have come after the check: without `force` it stays.
            if not self.force or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            _exchange(self.path, self.out)
            shutil.rmtree(self.path, ignore_errors=True)  # now the old content
        sync(self.out.parent)


@contextlib.contextmanager
def draft(out: Path, *, force: bool) -> Iterator[Draft]:
    """Yield a folder to write a bundle into; remove it unless it was published.

    Raises:
        OutputError: the place is taken, cannot be written, or the disk is full.
    """
    out = _absolute(out)
    check_place(out, force=force)
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            path = stack.enter_context(unfinished(out, folder=True))
        except OSError as error:
            raise _cannot_write(out, error) from error
        try:
            yield Draft(path, out, force)
        except OSError as error:
            if error.errno in NO_PLACE:
                raise _cannot_write(out, error) from error
            raise


def check_place(
    out: Path, *, force: bool, inputs: Mapping[str, str | Path | None] | None = None
) -> None:
    """Check that a bundle may be written at a place.

    Args:
        out: the place.
        force: whether what lies there may be replaced.
        inputs: what the build reads, by what it is called; never replaced.

    Raises:
        OutputError: it is a file, a folder with something in it and no `force`, a folder
            that eptc cannot have written (one with other folders inside), or holds an input.
    """
    out = _absolute(out)
    try:
        os.fspath(out).encode()
    except UnicodeEncodeError as error:  # ONNX Runtime takes no other names
        raise OutputError(
            f"the output {str(out)!a} has a name that is no UTF-8",
            fix="name another folder with --out",
        ) from error
    try:
        _check_place(out, force=force)
        for what, path in (inputs or {}).items():
            if path is not None and out.exists() and _holds(out, Path(path)):
                raise OutputError(
                    f"the output folder {out} is or holds {what}, which --force would remove",
                    expected="a place of its own",
                    fix="name another folder with --out",
                )
    except OSError as error:
        raise _cannot_write(out, error) from error


def _absolute(out: Path) -> Path:
    return Path(os.path.abspath(out))  # noqa: PTH100  # resolve() would follow a link at `out`


def _holds(out: Path, path: Path) -> bool:
    """Whether a path is a folder or something in it, under whatever name."""
    path = path.resolve()
    return out.resolve() in (path, *path.parents)


def _check_place(out: Path, *, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        parent = next(p for p in out.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"the output {out} cannot be written: {parent} is "
                + ("a folder this user may not write to" if parent.is_dir() else "not a folder"),
                fix="name another folder with --out",
            )
        return
    if not out.is_dir() or out.is_symlink():
        raise OutputError(f"the output {out} is not a folder", expected="a new or empty folder")
    content = sorted(entry.name for entry in out.iterdir())
    if not content:
        return
    if not force:
        raise OutputError(
            f"the output folder {out} is not empty: it holds {', '.join(content[:3])}",
            expected="a new or empty folder",
            fix="name another folder, or pass --force to replace what is there",
        )
    known = _written_folders(out)
    for entry in sorted(out.rglob("*")):
        if entry.is_dir() and entry.relative_to(out).as_posix() not in known:
            raise OutputError(
                f"the output folder {out} holds folders that eptc did not write, such as "
                f"{entry.relative_to(out)}",
                expected="what eptc wrote, or a folder with plain files only, to replace with "
                "--force",
                fix="name another folder, or remove this one yourself",
            )


def _written_folders(out: Path) -> set[str]:
    """Return the folders, by their paths inside, that eptc wrote at a place."""
    try:
        found = json.loads((out / PROVENANCE).read_text("utf-8"))["folders"]
        return set(found)
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def share(path: Path) -> None:
    """Let a file be read by whom files are by default; some writers keep theirs to the user."""
    path.chmod(0o666 & ~_umask())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with a stable layout: UTF-8, two spaces, a final newline."""
    path.write_text(
        json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )


def write_manifest(
    directory: Path, manifest: Manifest, digests: Mapping[str, str] | None = None
) -> Manifest:
    """Write the manifest of a folder whose files are complete; return it with their hashes.

    Files the manifest lists already are taken to be as they were when it was written.

    Args:
        directory: the folder.
        manifest: what it says.
        digests: SHA-256 (hex) of files, by name, that were hashed while they were written.
    """
    written = {name: record.sha256 for name, record in manifest.files.items()}
    manifest = dataclasses.replace(
        manifest, files=file_records(directory, {**(digests or {}), **written})
    )
    write_json(directory / MANIFEST, sealed(manifest.to_json()))
    return manifest


def file_records(
    directory: Path, digests: Mapping[str, str] | None = None
) -> dict[str, FileRecord]:
    """Return hash and size of each file of a folder but its manifest; arguments as above."""
    known = digests or {}
    return {
        path.name: FileRecord(known.get(path.name) or sha256(path), path.stat().st_size)
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST and path.is_file()
    }


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can, in two renames where it cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    if rename is not None:
        if rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(old))
    aside = new.with_name(new.name + "-old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


@contextlib.contextmanager
def written_by(library: str, path: Path, failure: type[Exception]) -> Iterator[None]:
    """Say what cannot be written where a library's errors are none of the system's.

    Args:
        library: what writes.
        path: the file it writes.
        failure: what it raises.

    Raises:
        OutputError: it failed.
    """
    try:
        yield
    except failure as error:
        raise OutputError(
            f"{library} cannot write {path.name}: {error}",
            expected=_ROOM,
            fix="free some space or name another folder; nothing was published",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{out} cannot be written: {error.strerror or error}",
        expected=_ROOM,
        fix="free some space or name another folder with --out; nothing was published",
    )
