"""What the machine has left, read from trees of files as systems have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eptc.machine import available_memory

MEMINFO = "MemTotal:       1000 kB\nMemFree:   10 kB\nMemAvailable:    700 kB\n"


def tree(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_what_linux_calls_available(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, proc__meminfo=MEMINFO)) == 700 * 1024


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [("max", 700 * 1024), ("500000", 400_000), ("99999999999999", 700 * 1024)],
)
def test_the_group_may_leave_less(tmp_path: Path, limit: str, wanted: int) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=MEMINFO,
        sys__fs__cgroup__memory_max=limit,
        sys__fs__cgroup__memory_current="100000\n",
    )
    assert available_memory(root) == wanted


def test_the_first_kind_of_groups(tmp_path: Path) -> None:
    root = tree(tmp_path, proc__meminfo=MEMINFO)
    group = root / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("300000\n")
    (group / "memory.usage_in_bytes").write_text("100000\n")
    assert available_memory(root) == 200_000


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
