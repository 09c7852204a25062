"""How many CPUs a process may use, read from a tree that looks like the system's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eptc.runtime.cpus import cpu_kind, saturates, usable_cpus

CGROUP = "sys/fs/cgroup"
TREES: dict[str, tuple[dict[str, str], int | None]] = {
    "no control groups": ({}, None),
    "v2, no quota": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "max 100000\n"}, None),
    "v2, one CPU": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "100000 100000\n"}, 1),
    "v2, half a CPU": ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "50000 100000\n"}, 1),
    "v2, in a group": (
        {
            "proc/self/cgroup": "0::/system.slice/app.service\n",
            f"{CGROUP}/system.slice/app.service/cpu.max": "100000 100000\n",
        },
        1,
    ),
    "v2, the group around it": (
        {
            "proc/self/cgroup": "0::/pod/app\n",
            f"{CGROUP}/pod/cpu.max": "90000 100000\n",
            f"{CGROUP}/pod/app/cpu.max": "max 100000\n",
        },
        1,
    ),
    "v2, more than there are": (
        {"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "99900000 100000\n"},
        None,
    ),
    "v1, no quota": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/\n",
            f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            f"{CGROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v1, in a container": (
        {
            "proc/self/cgroup": "11:memory:/docker/4f\n3:cpu,cpuacct:/docker/4f\n0::/\n",
            f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": "25000\n",
            f"{CGROUP}/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
        },
        1,
    ),
    "v1, alone": (
        {
            "proc/self/cgroup": "3:cpu:/app\n2:cpuset:/\n",
            f"{CGROUP}/cpu/app/cpu.cfs_quota_us": "1000\n",
            f"{CGROUP}/cpu/app/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "nonsense": (
        {"proc/self/cgroup": "\x00\n:::\n0::/\n", f"{CGROUP}/cpu.max": "many few\n"},
        None,
    ),
    "a period of nothing": (
        {"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "1000 0\n"},
        None,
    ),
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU set of eight: the quotas then count on any machine."""
    monkeypatch.setattr("eptc.runtime.cpus._cpu_set", lambda: 8)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("files", "count"), TREES.values(), ids=TREES)
def test_quota(tmp_path: Path, files: dict[str, str], count: int | None) -> None:
    assert usable_cpus(plant(tmp_path, files)) == (8 if count is None else count)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("quota", "count"), [(100, 1), (101, 2), (250, 3), (800, 8), (801, 8)])
def test_a_part_of_a_cpu_counts_as_one(tmp_path: Path, quota: int, count: int) -> None:
    files = {"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": f"{quota} 100\n"}
    assert usable_cpus(plant(tmp_path, files)) == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU sets")
def test_cpu_set(tmp_path: Path) -> None:
    """What this process may use, not what the machine has."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus(tmp_path) == len(before)


def test_cpu_kind(tmp_path: Path) -> None:
    """The same for CPUs of one kind whatever their number and speed; else another."""
    one = "processor\t: 0\nvendor_id\t: X\nmodel name\t: Y\ncpu MHz\t\t: 100.0\nflags\t\t: a b\n"
    two = one + one.replace(": 0", ": 1").replace("100.0", "700.0")
    other = one.replace("a b", "a b avx512f")
    kinds = [
        cpu_kind(plant(tmp_path / str(i), {"proc/cpuinfo": text}))
        for i, text in enumerate((one, two, other))
    ]
    assert kinds[0] is not None
    assert kinds[0] == kinds[1] != kinds[2]
    assert cpu_kind(tmp_path) is None


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("flags\t\t: fpu avx2 avx_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", False),
        ("", False),
    ],
)
def test_saturates(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    """x86 without instructions that add 8-bit products in 32 bits; no other processor."""
    assert saturates(plant(tmp_path, {"proc/cpuinfo": cpuinfo})) is expected
