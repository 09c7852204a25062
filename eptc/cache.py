"""The folder in which work is kept that another build would repeat."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


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
