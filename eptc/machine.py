"""What the machine has left."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["available_memory", "release_memory"]

_ROOT = Path("/")
_GROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_memory(root: Path = _ROOT) -> int | None:
    """Return how many bytes this process could still use; None where the system does not say.

    The least of what Linux calls available and what is left of the control group's limit.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    found = []
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        found += [int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable:")]
    except OSError:
        return None
    for limit, used in _GROUPS:
        group = root / "sys/fs/cgroup"
        try:
            left = int((group / limit).read_text("ascii")) - int((group / used).read_text("ascii"))
            found.append(left)
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found, default=None)


def release_memory() -> None:
    """Give what was freed in small pieces back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
