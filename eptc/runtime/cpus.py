"""How many CPUs this process may use, and which kind they are."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

__all__ = ["cpu_kind", "saturates", "usable_cpus"]

_ROOT: Final = Path("/")

# What /proc/cpuinfo says of a processor's kind, on x86 and on Arm; the rest is its number or its
# present speed.
_KIND: Final = frozenset({
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
})  # fmt: skip


def usable_cpus(root: Path = _ROOT) -> int:
    """Return how many CPUs this process may use at once, at least 1.

    The least of its CPU set (`taskset`, cpusets; on Python 3.13 and later also
    `PYTHON_CPU_COUNT`) and the CPU quota of its control groups (`docker run --cpus 2`), a part
    of a CPU counted as one. More threads than that would wait for each other.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    count = _cpu_set()
    quota = _cpu_quota(root)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cpu_kind(root: Path = _ROOT) -> str | None:
    """Return a text that is the same for CPUs of one kind; None where the system has none.

    Args:
        root: the folder that holds `proc`.
    """
    found = {
        line.replace("\t", "")
        for line in _lines(root / "proc/cpuinfo")
        if line.partition(":")[0].strip() in _KIND
    }
    return "\n".join(sorted(found)) or None


def saturates(root: Path = _ROOT) -> bool:
    """Whether products of unsigned and signed 8-bit integers may overflow on this processor.

    x86 without VNNI adds two such products in 16 bits and cuts what does not fit: with weights
    that use all of their 8 bits the sums are wrong, and nothing says so.

    Args:
        root: the folder that holds `proc`.
    """
    for line in _lines(root / "proc/cpuinfo"):
        name, _, flags = line.partition(":")
        if name.strip() == "flags":  # x86 alone has them under this name
            return not {"avx512_vnni", "avx_vnni"}.intersection(flags.split())
    return False


def _cpu_set() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(root: Path) -> float | None:
    """Return the smallest quota of the process's control groups and the groups around them."""
    quotas = []
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts = root / "sys/fs/cgroup"
        if number == "0":  # version 2, alone or beside version 1
            for place in (mounts, mounts / "unified"):
                quotas += [_quota_v2(folder) for folder in _around(place, group)]
        elif "cpu" in controllers.split(","):
            for place in (mounts / controllers, mounts / "cpu"):
                quotas += [_quota_v1(folder) for folder in _around(place, group)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _around(mount: Path, group: str) -> list[Path]:
    """Return a group's folder and those of the groups around it.

    In a container the group's name may be the host's, and only the mount itself be there.
    """
    folder = mount / group.strip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]


def _quota_v2(folder: Path) -> float | None:
    words = " ".join(_lines(folder / "cpu.max")).split()
    return _ratio(*words) if len(words) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    quota = _lines(folder / "cpu.cfs_quota_us")
    period = _lines(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota: str, period: str) -> float | None:
    """Return quota / period; None where there is none: `max`, or -1."""
    if not (quota.isdecimal() and period.isdecimal()) or int(period) == 0 or int(quota) == 0:
        return None
    return int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
