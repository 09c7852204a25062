"""The folder in which work is kept that another build would repeat."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["cache_folder", "code_hash"]


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
