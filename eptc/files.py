"""Files and folders that are there as a whole or not at all, and what files are known by."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["replacing", "sha256", "sync", "unfinished"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes a place when it is complete; its folder is made.

    It is written beside its place and renamed: who is killed leaves no half of one there, and
    two may write at once.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path) as beside:
        with beside.open("wb") as file:
            yield file
        beside.replace(path)


@contextlib.contextmanager
def unfinished(place: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new file, or folder, beside a place; what was not renamed by then is removed.

    It is locked while it is being written, and a killed writer's lock is free: what it left goes
    when the next one begins. In a file system without locks it stays.

    Args:
        place: what it is to become.
        folder: whether it is a folder.

    Raises:
        OSError: nothing can be written there.
    """
    _remove_abandoned(place)
    path, lock = _locked(place, folder=folder)
    try:
        yield path
    finally:
        os.close(lock)
        _remove(path)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex; it is read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(place: Path) -> str:
    return f".{place.name}.eptc-"


def _remove_abandoned(place: Path) -> None:
    """Remove what writers that are gone were to put in a place."""
    for path in place.parent.glob(f"{glob.escape(_prefix(place))}*"):
        # Not by the writer's process id: in a container every writer may have the same one.
        with contextlib.suppress(OSError):  # held, gone, or no locks here: not ours to remove
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)


def _locked(place: Path, *, folder: bool) -> tuple[Path, int]:
    """Return a new file or folder, and the open lock that says that it is being written.

    Another writer may find it before it is locked, take it for abandoned and remove it: then
    there is a next one.
    """
    while True:
        path = place.with_name(_prefix(place) + secrets.token_hex(8))
        if folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
