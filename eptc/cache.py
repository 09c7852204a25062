"""The folder in which work is kept that another build would repeat."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

__all__ = ["cache_folder", "code_hash", "replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that takes a place when it is complete; its folder is made.

    It is written beside its place and renamed: who is killed leaves no half of one there, and
    two may write at once.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


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
