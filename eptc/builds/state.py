"""What is known of a build beside its files: whose it is, of what, and whether it is whole.

Each build of a root has two files in `<root>/.eptc-build`: a record, replaced in one step, and a
lock, held while it is built. Who is killed holds no lock any more, and leaves a record that says
`building`; whoever comes next removes the rest and builds again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from eptc.errors import OutputError
from eptc.files import replacing, sha256

__all__ = ["FOLDER", "Place", "Record", "digest", "folder_hashes", "whole"]

FOLDER = ".eptc-build"
_VERSION = 1
# What the system says where files have no locks; then nobody else builds at the same time, or the
# last one wins, whole.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclasses.dataclass(frozen=True)
class Record:
    """What was built at a place.

    Args:
        state: `building`, or `done`.
        key: hash of everything that it depends on.
        files: SHA-256 (hex) of every file, by its path inside; only of what is done.
    """

    state: Literal["building", "done"]
    key: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the record of a build is.

    Args:
        root: the plan's.
        name: the build's.
    """

    root: Path
    name: str

    def _file(self, suffix: str) -> Path:
        return self.root / FOLDER / (urllib.parse.quote(self.name, safe="") + suffix)

    def read(self) -> Record | None:
        """Return the record; None where there is none that can be understood."""
        try:
            found = json.loads(self._file(".json").read_text("utf-8"))
            if found.pop("schema") != _VERSION:
                return None
            record = Record(**found)
            return record if isinstance(record.files, dict) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def write(self, record: Record) -> None:
        """Replace the record in one step; raise OutputError where it cannot be written."""
        data = {"schema": _VERSION, **dataclasses.asdict(record)}
        try:
            with replacing(self._file(".json")) as file:
                file.write(json.dumps(data, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def restore(self, record: Record | None) -> None:
        """Write back what was read; it is not worth an error where that cannot be."""
        with contextlib.suppress(OSError, OutputError):
            if record is None:
                self._file(".json").unlink()
            else:
                self.write(record)

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.root / FOLDER} cannot be written: {error.strerror or error}",
            expected="a folder with enough room that this user may write to",
        )

    @contextlib.contextmanager
    def claimed(self, waiting: Callable[[], object]) -> Iterator[None]:
        """Hold the place; nobody else builds there meanwhile.

        Args:
            waiting: called where somebody else does, before it is waited for.

        Raises:
            OutputError: the root cannot be written.
        """
        path = self._file(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never removed: who waits for a file that is gone would hold another lock than others.
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            _lock(lock, waiting)
            yield
        finally:
            os.close(lock)


def _lock(lock: int, waiting: Callable[[], object]) -> None:
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def folder_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of every file in a folder, by its path inside; no hidden ones."""
    return dict(_hashes(folder, ()))


def _hashes(folder: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    # Links are followed, which rglob() does not: readers follow them. Not in a circle.
    above = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path.name, sha256(path)
        elif path.is_dir() and path.resolve() not in above:
            for inside, found in _hashes(path, above):
                yield f"{path.name}/{inside}", found


def whole(folder: Path, record: Record) -> bool:
    """Whether a folder holds what was recorded, to the byte, and nothing else."""
    try:
        return folder_hashes(folder) == dict(record.files)
    except OSError:
        return False


def digest(data: Any) -> str:
    """Return the SHA-256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
