"""The machine, and how busy others keep it. Linux tells more than other systems."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.places import ROOT
from benchmarks.results import Machine

__all__ = ["Load", "cpu_seconds", "describe", "revision", "threads_available"]


def threads_available() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> Machine:
    """Return what the machine is."""
    return Machine(
        cpu=_cpu(),
        cpus=threads_available(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def revision() -> str:
    """Return the checkout's commit, with a plus where files differ from it."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return "unknown"
    described = subprocess.run(  # noqa: S603  # git, with fixed arguments
        [git, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "unknown"


def _cpu() -> str:
    """Return the CPU's name; where it does not say its model, with its family and model number."""
    info: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} (family {info['cpu family']}, model {info['model']})"


def cpu_seconds(pid: int, *, children: bool = False) -> float | None:
    """Return the CPU time a process has used; None where the system does not tell.

    Args:
        pid: the process.
        children: count those it has waited for as well.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(map(int, fields[11 : 15 if children else 13])) / os.sysconf("SC_CLK_TCK")


class Load:
    """How much CPU time anything but some processes uses, from now on.

    Args:
        pids: the processes that do not count, nor do those they wait for; they must outlive the
            measurement.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._start = (time.monotonic(), self._busy(), self._own())

    def foreign(self) -> float | None:
        """Return the share of all CPUs' time that others used; None where nobody tells."""
        wall, busy, own = self._start
        now_busy, now_own = self._busy(), self._own()
        if busy is None or now_busy is None:
            return None
        used = (now_busy - busy) - (now_own - own)
        return max(0.0, used / ((time.monotonic() - wall) * (os.cpu_count() or 1)))

    def _own(self) -> float:
        return sum(cpu_seconds(pid, children=True) or 0.0 for pid in self._pids)

    def _busy(self) -> float | None:
        """Return the CPU time the whole machine has worked since it started."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        user, nice, system, _idle, _wait, irq, soft = map(int, path.read_text().split()[1:8])
        return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
