"""Verification in a process of its own: the same verdict, and no way to end without one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc import checkpoint, engine_build, planning
from eptc.errors import BaseModelError, InternalError, OptionError, ParityError
from eptc.parity_gate import LocalVerifier, RemoteVerifier, Subject


def subject(native: Any, **changes: Any) -> Subject:
    source = checkpoint.read(native.ckpt, native.base)
    given: dict[str, Any] = {
        "source": source, "task": "tone", "examples": None, "by_block": False,
    }  # fmt: skip
    return Subject(**{**given, **changes})


@contextlib.contextmanager
def remote(native: Any, **changes: Any) -> Iterator[RemoteVerifier]:
    with contextlib.closing(RemoteVerifier(subject(native, **changes))) as found:
        yield found


def _build(native: Any, out: Path, **options: Any) -> Any:
    return eptc.export(native.ckpt, base=native.base, task="tone", out=out, **options)


def test_bundles_are_the_same(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build(small_native, tmp_path / "here")
    monkeypatch.setattr(planning, "_LARGE", 0)
    started: list[RemoteVerifier] = []
    start = RemoteVerifier.__init__

    def counted(self: RemoteVerifier, given: Subject) -> None:
        started.append(self)
        start(self, given)

    monkeypatch.setattr(RemoteVerifier, "__init__", counted)
    events: list[Any] = []
    _build(small_native, tmp_path / "there", progress=events.append)
    (verifier,) = started
    assert verifier._process.returncode is not None
    assert any(str(event).startswith("parity: seeded") for event in events)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def test_block_by_block_gives_the_same_layers(small_native: Any) -> None:
    whole, blocks = (
        LocalVerifier(subject(small_native, by_block=flag)).layers() for flag in (False, True)
    )
    assert whole.task_id == blocks.task_id
    assert whole.wanted.keys() == blocks.wanted.keys()
    for path, (output, largest) in whole.wanted.items():
        assert (blocks.wanted[path][0] == output).all()
        assert blocks.wanted[path][1] == largest


def test_a_failure_there_is_a_failure_here(
    copy_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference does not share the compiler's memory, nor a fault planted in it."""
    from eptc.ir import folding

    fold = folding._fold
    monkeypatch.setattr(planning, "_LARGE", 0)
    monkeypatch.setattr(folding, "_fold", lambda *given: fold(*given)[::-1].copy())
    with pytest.raises(ParityError, match="fold-pyramid"):
        _build(copy_native, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_graph_is_blamed_on_its_pass(
    copy_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eptc.passes.gather_early import GatherEarly

    sound = GatherEarly.rewrite

    def rewrite(self: GatherEarly, model: Any) -> int:
        changed = sound(self, model)
        node = next(node for node in model.graph if node.op_type == "Softmax")
        node.attributes["axis"] = type(node.attributes["axis"])(
            "axis", node.attributes["axis"].type, 1
        )
        return changed + 1

    monkeypatch.setattr(planning, "_LARGE", 0)
    monkeypatch.setattr(GatherEarly, "rewrite", rewrite)
    with pytest.raises(ParityError, match="the pass gather-early is the first step"):
        _build(copy_native, tmp_path / "out")


def test_errors_keep_their_kind(copy_native: Any) -> None:
    given = subject(copy_native)
    (copy_native.base / "config.json").unlink()
    with (
        contextlib.closing(RemoteVerifier(given)) as found,
        pytest.raises(BaseModelError, match=r"config\.json") as error,
    ):
        found.layers()
    assert error.value.exit_code == 2


def test_a_bug_there_is_said_as_one(small_native: Any) -> None:
    with remote(small_native, examples=5) as found:
        found.layers()
        with pytest.raises((InternalError, ParityError)):
            found.prove(Path("nowhere"), {}, lambda _: None)


def test_a_killed_process_is_named(small_native: Any) -> None:
    with remote(small_native) as found:
        os.kill(found._process.pid, signal.SIGKILL)
        with pytest.raises(OptionError, match=r"killed by signal 9.*memory"):
            found.layers()


def test_nothing_is_published_where_it_is_killed(
    copy_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_LARGE", 0)
    sound = RemoteVerifier.prove

    def prove(self: RemoteVerifier, *given: Any) -> Any:
        os.kill(self._process.pid, signal.SIGKILL)
        return sound(self, *given)

    monkeypatch.setattr(RemoteVerifier, "prove", prove)
    (tmp_path / "place").mkdir()
    with pytest.raises(OptionError, match="killed"):
        _build(copy_native, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_it_ends_with_the_compiler(small_native: Any, tmp_path: Path) -> None:
    """Also where the compiler is killed and can say nothing."""
    script = tmp_path / "compile.py"
    script.write_text(
        "import sys, time\n"
        "from eptc import checkpoint\n"
        "from eptc.parity_gate import RemoteVerifier, Subject\n"
        "source = checkpoint.read(*map(__import__('pathlib').Path, sys.argv[1:3]))\n"
        "given = Subject(source, 'tone', None, False)\n"
        "found = RemoteVerifier(given)\n"
        "print(found._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    compiler = subprocess.Popen(
        [sys.executable, script, small_native.ckpt, small_native.base],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        text=True,
    )
    assert compiler.stdout is not None
    child = int(compiler.stdout.readline())
    compiler.kill()
    compiler.wait()
    compiler.stdout.close()
    for _ in range(3000):
        if not Path(f"/proc/{child}/stat").exists() or _state(child) in "ZX":
            return
        time.sleep(0.02)
    raise AssertionError("it still runs")


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_a_small_model_is_compared_here(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    _build(small_native, tmp_path / "out")


def test_no_reference_where_none_is_wanted(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was asked for")

    monkeypatch.setattr(engine_build, "_verifier", refuse)
    _build(small_native, tmp_path / "out", verify=False)
