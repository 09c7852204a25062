"""Two builds of the same input, anywhere and after anything, are equal to the byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc import skeletons

# Builds every input in the order given, each time from the folder it is started in.
_BUILD = """
import json, sys
import eptc
for source, base, out, options in json.loads(sys.argv[1]):
    eptc.export(source, base=base, out=out, **options)
"""
_RELEASED = {"top_k": 2, "tasks": ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)


def _start(jobs: Any, cwd: Path, seed: str) -> subprocess.Popen[str]:
    cwd.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, json.dumps(jobs)],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONHASHSEED": seed,
            "OMP_NUM_THREADS": "1",
            "EPTC_CACHE_DIR": "",  # nothing kept: each process traces for itself
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def test_builds_are_equal_to_the_byte(golden: Path, small_native: Any, tmp_path: Path) -> None:
    """Other folders, other orders, other hash seeds, other names of the same task.

    Both processes build every input, parity included, in opposite orders: what came before in a
    process leaves no trace in a bundle.
    """
    inputs: dict[str, tuple[Path, Path, dict[str, Any]]] = {
        "native": (small_native.ckpt, small_native.base, {"task": "tone"}),
        "t5": (
            golden / "ept" / "t5-tiny" / "adapter",
            golden / "ept" / "t5-tiny" / "base",
            {"task": "sst2", **_RELEASED},
        ),
        "llama": (
            golden / "ept" / "llama-tiny" / "adapter",
            golden / "ept" / "llama-tiny" / "base",
            {"task": "rte", **_RELEASED, "verify": False},
        ),
    }
    other_names = {"native": "sentiment", "t5": 6, "llama": "entailment"}
    here, there = tmp_path / "here", tmp_path / "far" / "away" / "there"
    one: list[Any] = []
    two: list[Any] = []
    for name, (source, base, options) in inputs.items():
        one.append((str(source), str(base), str(here / name), options))
        # The same content at another place, named relative to another working folder.
        _copy(source, there / "in" / name)
        _copy(base, there / "in" / f"{name}-base")
        renamed = {**options, "task": other_names[name]}
        two.insert(0, (f"in/{name}", f"./in/{name}-base", f"../out/{name}", renamed))
    processes = [_start(one, here, "0"), _start(two, there, "4711")]
    for process in processes:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")  # quiet, too

    for name in inputs:
        first, second = _files(here / name), _files(there.parent / "out" / name)
        assert first.keys() == second.keys()
        assert [file for file in first if first[file] != second[file]] == [], name
        for file, content in first.items():
            for folder in (tmp_path, golden, Path(eptc.__file__).parents[1]):
                assert str(folder).encode() not in content, file


def test_a_build_is_repeated_after_others(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: after another task, traced anew, and from the cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EPTC_CACHE_DIR", str(cache))

    def build(task: str, out: Path) -> dict[str, bytes]:
        eptc.export(small_native.ckpt, base=small_native.base, task=task, out=out)
        return _files(out)

    first = build("tone", tmp_path / "one")
    build("score", tmp_path / "other")
    skeletons._skeleton.cache_clear()
    assert build("tone", tmp_path / "kept") == first
    skeletons._skeleton.cache_clear()
    shutil.rmtree(cache)
    build("same", tmp_path / "another")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert build("tone", Path("two")) == first
