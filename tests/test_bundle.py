"""Publishing: all of a bundle or nothing, whatever happens while it is written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc import bundle
from eptc.errors import OutputError
from eptc.runtime import load_manifest, verify


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


# ---- the draft


def test_nothing_is_visible_before_it_is_published(tmp_path: Path) -> None:
    out = tmp_path / "new" / "bundle"
    with bundle.draft(out, force=False) as draft:
        write(draft.path, a="1")
        assert not out.exists()
        assert names(out.parent)[0].startswith(".bundle.eptc-")
        draft.publish()
    assert names(out.parent) == ["bundle"]
    assert names(out) == ["a"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_permissions_are_those_of_any_new_folder(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with bundle.draft(tmp_path / "out", force=False) as draft:
            draft.publish()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode


def _fail_half_way(out: Path, error: type[BaseException], *, force: bool) -> None:
    with bundle.draft(out, force=force) as draft:
        write(draft.path, new="2")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        _fail_half_way(tmp_path / "out", error, force=False)
    assert names(tmp_path) == []


def test_a_draft_that_was_not_published_is_removed(tmp_path: Path) -> None:
    with bundle.draft(tmp_path / "out", force=False) as draft:
        write(draft.path, a="1")
    assert names(tmp_path) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with bundle.draft(tmp_path / "out", force=False) as draft:
        write(draft.path, a="1")
        draft.publish()
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("atomic", [True, False])
def test_force_swaps_old_for_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    """Also where the system cannot exchange two folders in one step."""
    if not atomic:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    out = write(tmp_path / "out", old="1", both="1")
    with bundle.draft(out, force=True) as draft:
        write(draft.path, new="2", both="2")
        assert names(out) == ["both", "old"]
        draft.publish()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["both", "new"]
    assert (out / "both").read_text() == "2"


def test_a_failed_force_keeps_the_old(tmp_path: Path) -> None:
    out = write(tmp_path / "out", old="1")
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(out, ZeroDivisionError, force=True)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]


def test_the_place_is_taken_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bundle.draft(out, force=False) as draft:
        write(out, theirs="1")
        with pytest.raises(OutputError, match="is not empty"):
            draft.publish()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["theirs"]


def test_the_place_is_taken_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the rename: the rename itself refuses, or swaps with force."""
    out = tmp_path / "out"
    check_place = bundle.check_place

    def late(place: Path, *, force: bool) -> None:
        check_place(place, force=force)
        if list(tmp_path.glob(".out*")):
            write(out, theirs="1")

    monkeypatch.setattr(bundle, "check_place", late)

    def build(*, force: bool) -> None:
        with bundle.draft(out, force=force) as draft:
            write(draft.path, ours="1")
            draft.publish()

    with pytest.raises(OutputError, match="cannot be written: Directory not empty"):
        build(force=False)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["theirs"]
    build(force=True)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["ours"]


# ---- abandoned drafts


@pytest.mark.parametrize("name", ["out", "a[b]*?", "..x", "with space"])
def test_abandoned_drafts_of_this_place_are_removed(tmp_path: Path, name: str) -> None:
    write(tmp_path / f".{name}.eptc-abandoned", weights="half")
    others = (".other.eptc-abandoned", f"{name}.eptc-abandoned", ".outer.eptc-x")
    for other in others:
        write(tmp_path / other, weights="half")
    with bundle.draft(tmp_path / name, force=False) as draft:
        draft.publish()
    assert names(tmp_path) == sorted([name, *others])


def test_a_draft_that_is_being_written_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bundle.draft(out, force=False) as first:
        write(first.path, a="1")
        with bundle.draft(out, force=False) as second:
            assert second.path != first.path
            assert names(first.path) == ["a"]
        assert names(tmp_path) == [first.path.name]
        first.publish()
    assert names(tmp_path) == ["out"]


def test_a_lock_that_others_hold(tmp_path: Path) -> None:
    """A builder in another container is known by its lock alone."""
    theirs = write(tmp_path / ".out.eptc-theirs", weights="half")
    lock = os.open(theirs, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with bundle.draft(tmp_path / "out", force=False):
            assert theirs.exists()
    finally:
        os.close(lock)
    with bundle.draft(tmp_path / "out", force=False):
        assert not theirs.exists()


@pytest.mark.parametrize("moment", ["opened", "locked"])
def test_a_draft_taken_for_abandoned_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another build may look between the moment a draft is made and the moment it is locked."""
    where, name = (os, "open") if moment == "opened" else (fcntl, "flock")
    function = getattr(where, name)
    removed: list[Path] = []

    def late(*arguments: Any) -> Any:
        if not removed:
            removed.append(next(tmp_path.iterdir()))
            removed[0].rmdir()
        return function(*arguments)

    monkeypatch.setattr(where, name, late)
    with bundle.draft(tmp_path / "out", force=False) as draft:
        assert draft.path != removed[0]
        draft.publish()
    assert names(tmp_path) == ["out"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    theirs = write(tmp_path / ".out.eptc-theirs", weights="half")
    with bundle.draft(tmp_path / "out", force=False) as draft:
        draft.publish()
    assert names(tmp_path) == sorted([theirs.name, "out"])


# ---- places


@pytest.mark.parametrize("force", [True, False])
def test_places_that_are_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "folders" / "inside")
    for name in (
        "file", "link", "folders", "file/below", "file/far/below", "x" * 300, "no UTF-8 \udcff",
    ):  # fmt: skip
        with pytest.raises(OutputError):
            bundle.check_place(tmp_path / name, force=force)
    bundle.check_place(tmp_path / "empty", force=force)
    bundle.check_place(tmp_path / "new" / "new", force=force)
    assert names(tmp_path) == ["empty", "file", "folders", "link"]


def test_places_this_user_may_not_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="may not write to"):
        bundle.check_place(tmp_path / "out", force=False)

    def denied(*_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        bundle.check_place(tmp_path / "out", force=False)


@pytest.mark.parametrize("inside", [".", "a.json", "far/below.json"])
def test_an_input_is_never_replaced(tmp_path: Path, inside: str) -> None:
    write(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "sub" / ".." / "out"):
        for path in (tmp_path / "out" / inside, tmp_path / "link" / inside):
            with pytest.raises(OutputError, match="is or holds the probes"):
                bundle.check_place(out, force=True, inputs={"the probes": path})
    bundle.check_place(tmp_path / "out", force=True, inputs={"the probes": None})
    bundle.check_place(tmp_path / "out" / "new", force=True, inputs={"x": tmp_path / "out"})


# ---- what is written


def test_json_has_a_stable_layout(tmp_path: Path) -> None:
    bundle.write_json(tmp_path / "x.json", {"b": [1, 2.5], "a": "ü€"})
    text = '{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": "ü€"\n}\n'
    assert (tmp_path / "x.json").read_bytes() == text.encode()
    with pytest.raises(ValueError, match="Out of range"):
        bundle.write_json(tmp_path / "y.json", {"a": float("nan")})


def test_the_manifest_lists_every_file(small_native: Any, tmp_path: Path) -> None:
    built = _export(small_native, tmp_path / "out")
    manifest = json.loads((built.path / "manifest.json").read_text())
    assert manifest["files"].keys() == set(names(built.path)) - {"manifest.json"}
    for name, record in manifest["files"].items():
        data = (built.path / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert all((built.path / name).is_file() for name in names(built.path))
    assert not any((built.path / name).is_symlink() for name in names(built.path))


# ---- a disk that is full, a process that is stopped


def _export(folders: Any, out: Path, **options: Any) -> Any:
    return eptc.export(
        folders.ckpt, base=folders.base, task="tone", out=out, **{"verify": False, **options}
    )


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO]
)
@pytest.mark.parametrize("when", ["eptc.lower.write", "eptc.bundle.write_manifest"])
def test_writing_fails(
    small_native: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int,
    when: str,
) -> None:  # fmt: skip
    def full(_: object, directory: Any = None, *__: object, **___: object) -> None:
        folder = directory if isinstance(directory, Path) else next(tmp_path.glob(".out*"))
        write(folder, half="of it")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(when, full)
    _refused(small_native, cli, tmp_path, os.strerror(code))


def _refused(folders: Any, cli: Any, place: Path, words: str, kind: tuple[str, ...] = ()) -> None:
    """An export that finds no room: exit 2, a message, nothing left."""
    before = names(place)
    options = ("--task", "tone", "--base", folders.base, "--no-verify", *kind)
    result = cli("export", folders.ckpt, *options, "-o", place / "out")
    assert result.code == 2, result
    assert words in result.stderr
    assert "free some space" in result.stderr
    assert "nothing was published" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(place) == before


def test_a_limit_on_the_size_of_files(small_native: Any, cli: Any, tmp_path: Path) -> None:
    _export(small_native, tmp_path / "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        _refused(small_native, cli, tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "kind", [(), ("--layout", "pack"), ("--target", "lora"), ("--target", "hf")]
)
def test_a_disk_that_is_full(
    small_native: Any, cli: Any, small_disk: Callable[[int], Path], kind: tuple[str, ...]
) -> None:
    _refused(small_native, cli, small_disk(32), "No space left on device", kind)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    "moment",
    ["eptc.checkpoint.read", "eptc.lower.bind", "eptc.lower.write", "eptc.compiled.describe",
     "eptc.compiled.write_texts", "eptc.bundle.write_manifest", "eptc.runtime.engine.Engine.load",
     "eptc.bundle.write_json", "eptc.bundle.sync"],
)  # fmt: skip
def test_interrupted(
    small_native: Any,
    cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    force: bool,
) -> None:
    """A real signal, each time just after another step; a bundle that was there stays whole."""
    import eptc.compiled  # noqa: F401  # so that its names can be replaced

    out = tmp_path / "out"
    if force:
        write(out, old="1")
    home, _, name = moment.rpartition(".")
    target = _resolve(home)
    function = getattr(target, name)

    def then_stop(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(target, name, then_stop)
    options = ("--task", "tone", "--base", small_native.base, *(("--force",) if force else ()))
    with _interrupts():
        result = cli("export", small_native.ckpt, *options, "-o", out)
    assert result.code == 130, result
    assert result.stderr.endswith("interrupted; nothing was published\n")
    assert names(tmp_path) == (["out"] if force else [])
    assert not force or names(out) == ["old"]


def _resolve(dotted: str) -> Any:
    """Return the module or class of a dotted name."""
    import importlib

    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        home, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(home), name)


def _command(folders: Any, out: Path, *extra: str) -> list[str]:
    """The installed command itself."""
    command = shutil.which("eptc", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the command eptc is not installed beside this Python")
    return [
        command, "export", str(folders.ckpt), "--base", str(folders.base), "--task", "tone",
        "-o", str(out), *extra,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "number"),
    [("read the checkpoint", signal.SIGINT), ("trace", signal.SIGINT), ("trace", signal.SIGTERM)],
)
def test_a_command_that_is_stopped(
    small_native: Any, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    """The installed command, a signal from outside, at a moment that lasts."""
    process = subprocess.Popen(
        _command(small_native, tmp_path / "out", "--verbose"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored and would stay so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = []
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            seen.append(line)
            if line.strip() == stage:
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.stdout.read() == ""
    message = "".join(seen) + rest
    assert process.returncode == 130, message
    assert "Traceback" not in message
    assert "interrupted; nothing was published" in message
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
import eptc.lower
write = eptc.lower.write
def then_die(graphs, directory, **options):
    write(graphs, directory, **options)
    (directory / "weights.bin").open("r+b").truncate(1000)
    os.kill(os.getpid(), signal.SIGKILL)
eptc.lower.write = then_die
import eptc
eptc.export(sys.argv[1], base=sys.argv[2], task="tone", out=sys.argv[3], verify=False)
"""


def test_killed_half_way(small_native: Any, cli: Any, tmp_path: Path) -> None:
    """What is left is no bundle by any name, and the next build removes it."""
    out = tmp_path / "out"
    arguments = map(str, (small_native.ckpt, small_native.base, out))
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.eptc-")
    assert "weights.bin" in names(left)
    for verb in ("verify", "run"):
        result = cli(verb, left, *(("good",) if verb == "run" else ()))
        assert result.code == 2
        assert "is not a bundle" in result.stderr

    _export(small_native, out)

    assert names(tmp_path) == ["out"]
    assert verify(out).ok


@pytest.mark.parametrize("force", [True, False])
def test_several_builds_into_one_place(small_native: Any, tmp_path: Path, force: bool) -> None:
    """One wins; the others say why not, or replace it whole. Nothing is mixed, nothing left."""
    _export(small_native, tmp_path / "warm")
    shutil.rmtree(tmp_path / "warm")
    barrier = threading.Barrier(4, timeout=60)
    draft = bundle.draft

    @contextlib.contextmanager
    def together(out: Path, *, force: bool) -> Iterator[bundle.Draft]:
        with draft(out, force=force) as made:
            barrier.wait()
            yield made

    def build(_: int) -> str:
        try:
            _export(small_native, tmp_path / "out", force=force)
        except OutputError as error:
            return str(error)
        return "built"

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(bundle, "draft", together)
        results = sorted(pool.map(build, range(4)))
    assert names(tmp_path) == ["out"]
    assert verify(tmp_path / "out").ok
    assert load_manifest(tmp_path / "out").files.keys() == set(names(tmp_path / "out")) - {
        "manifest.json"
    }
    if force:
        assert results == ["built"] * 4
    else:
        assert results.count("built") == 1
        assert all("not empty" in r or "cannot be written" in r for r in results if r != "built")
