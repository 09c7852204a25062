"""A file that takes its place when it is complete, whoever is killed or writes beside it."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eptc.files import replacing

_WRITER = """
import pathlib, sys
from eptc.files import replacing
with replacing(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def _writer(place: Path) -> subprocess.Popen[str]:
    """Start a process that stays in the middle of a file until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(place)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def _put(place: Path, *contents: Any) -> None:
    with replacing(place) as file:
        for content in contents:
            file.write(content)


# A pattern in the name, a dot first, one name that begins another.
@pytest.mark.parametrize("name", ["record.json", "a[1]*.json", ".hidden"])
def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path, name: str) -> None:
    place, other = tmp_path / name, tmp_path / f"{name}.more"
    _put(place, b"old")
    beside = _writer(other)
    killed = _writer(place)
    killed.kill()
    killed.communicate()
    assert place.read_bytes() == b"old"
    _put(place, b"new")
    beside.communicate(timeout=60)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: b"new", other.name: b"half",
    }  # fmt: skip


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "record.json"
    slow = _writer(place)
    _put(place, b"first")
    assert place.read_bytes() == b"first"
    slow.communicate(timeout=60)
    assert slow.returncode == 0
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"half"]


def test_many_write_at_once(tmp_path: Path) -> None:
    """Each file is whole, no writer loses its own, nothing is left."""
    place = tmp_path / "record.json"
    contents = [bytes([n]) * 10_000 for n in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: _put(place, content), contents))
    assert place.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [place]


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "record.json"
    _put(place, b"old")
    with pytest.raises(TypeError):
        _put(place, b"new", "no bytes")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {place.name: b"old"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_it_as_any_file(tmp_path: Path, umask: int) -> None:
    place = tmp_path / "record.json"
    before = os.umask(umask)
    try:
        _put(place, b"new")
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o777 == 0o666 & ~umask
