"""The folder in which work is kept that another build would repeat."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

__all__ = ["cache_folder", "code_hash", "replacing"]

_UNFINISHED = ".eptc-tmp"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes a place when it is complete; its folder is made.

    It is written beside its place and renamed: who is killed leaves no half of one there, and
    two may write at once. What a killed writer left beside the place is removed by the next.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    with _locked_file(path) as file:
        try:
            yield file
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _remove_abandoned(path: Path) -> None:
    """Remove unfinished files of this place whose writer is gone: nobody holds their lock."""
    for found in path.parent.glob(f"{glob.escape(_prefix(path))}*{_UNFINISHED}"):
        with contextlib.suppress(OSError), found.open("rb") as file:  # held, gone, no locks here
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.unlink()


def _locked_file(path: Path) -> IO[bytes]:
    """Return a new file beside a place, with the lock that says that it is being written.

    Another writer may find it before it is locked and take it for abandoned: then there is a next
    one.
    """
    while True:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115  # closed by the caller
            dir=path.parent, prefix=_prefix(path), suffix=_UNFINISHED, delete=False
        )
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if Path(file.name).exists():
            return file
        file.close()


def code_hash(files: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) of source files, in this order: what was made depends on them."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def cache_folder() -> Path | None:
    """Return where eptc may keep files between runs; None where the user wants none.

    `EPTC_CACHE_DIR` names it; set but empty, nothing is kept. Otherwise it is `eptc` in
    `XDG_CACHE_HOME`, else in `~/.cache`. It may not exist yet, and may be removed at any time.
    """
    named = os.environ.get("EPTC_CACHE_DIR")
    if named is not None:
        return Path(named) if named else None
    shared = os.environ.get("XDG_CACHE_HOME")
    # As the XDG base directory specification asks: a relative path is ignored.
    if shared and Path(shared).is_absolute():
        return Path(shared) / "eptc"
    try:
        return Path.home() / ".cache" / "eptc"
    except RuntimeError:  # a user without a home
        return None
