"""Graphs as ONNX Runtime runs them, kept on disk: optimised, weights packed for this CPU.

A session packs its matrices into a layout of its own: a copy in every session of every process.
Of a kept graph they are read from a file by mapping, so that all of them share one copy in the
page cache, and neither the optimiser nor the packing run again.

A kept graph is a folder whose name says what it was made from and for: the bundle's graph and
weights (SHA-256), ONNX Runtime, the kind of CPU, the provider's options. It is written under
another name and renamed when it is complete. Whatever goes wrong with it, the bundle itself is
loaded instead; the folder may be removed at any time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from eptc.cache import cache_folder
from eptc.errors import BundleError
from eptc.files import sha256, sync
from eptc.runtime.cpus import cpu_kind
from eptc.runtime.manifest import Manifest, bundle_file
from eptc.runtime.providers import CPU
from eptc.runtime.session import open_session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime.providers import Request

__all__ = ["check_bundle", "kept_in", "open_prepacked", "sources"]

logger = logging.getLogger(__name__)

_FORMAT: Final = 1
_GRAPH: Final = "graph.onnx"
_ALIGNMENT: Final = 64  # bytes
_SMALLEST_MAPPED: Final = (1 << 10, 1 << 17, 1 << 20)  # bytes of a tensor, by which of them works
_FILES: Final = (_GRAPH, f"{_GRAPH}.data")
_ENTRY: Final = "entry.json"
_UNFINISHED: Final = ".unfinished-"
_ABANDONED_AFTER: Final = 24 * 3600  # seconds; nothing takes that long to write
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def kept_in(cache: bool | str | Path) -> Path | None:
    """Return the folder to keep graphs in, or None.

    Args:
        cache: the folder; True: `eptc.cache.cache_folder()`; False: none.
    """
    if isinstance(cache, bool):
        return cache_folder() if cache else None
    return Path(cache)


def open_prepacked(
    cache: Path,
    folder: Path,
    manifest: Manifest,
    name: str,
    requests: Sequence[Request],
    threads: int,
) -> Any:
    """Return a session on the kept form of a graph, made now where there is none.

    Args:
        cache: the folder of kept graphs.
        folder: the bundle's folder.
        manifest: its manifest.
        name: the graph.
        requests: providers in order of preference.
        threads: threads one operator may use.

    Returns:
        The session, or None where nothing can be kept: the log says why, and the bundle itself
        is to be loaded.

    Raises:
        BundleError: the bundle's bytes are not those of its manifest.
    """
    kind = cpu_kind()
    if [provider for provider, _ in requests] != [CPU] or kind is None:
        return None  # weights are packed by the CPU provider alone
    identity = _identity(manifest, name, requests, kind)
    entry = cache / hashlib.sha256(identity.encode()).hexdigest()
    try:
        kept = _is_sound(entry, identity)
    except OSError as error:
        return _without(entry, error)
    if not kept:
        check_bundle(folder, manifest, name)
    try:
        if not kept:
            path = bundle_file(folder, manifest.graphs[name].file)
            _make(entry, identity, path, requests, threads, fuse=manifest.fusible)
        return open_session(entry / _GRAPH, requests, threads, optimize=False)
    except (OSError, BundleError) as error:
        return _without(entry, error)


def _without(entry: Path, error: Exception) -> None:
    logger.warning("the bundle is loaded without the kept graph %s: %s", entry, error)


def sources(manifest: Manifest, name: str) -> list[str]:
    """Return the graph's file and every file it may take weights from."""
    graphs = {spec.file for spec in manifest.graphs.values()} - {manifest.graphs[name].file}
    return sorted(f for f in manifest.files if f not in graphs and not f.endswith(".json"))


def _identity(manifest: Manifest, name: str, requests: Sequence[Request], kind: str) -> str:
    import onnxruntime

    values = {
        "format": _FORMAT,
        "graph": manifest.graphs[name].file,
        "files": {file: manifest.files[file].sha256 for file in sources(manifest, name)},
        "onnxruntime": [onnxruntime.__version__, onnxruntime.get_build_info()],
        "cpu": kind,
        "provider": [str(item) for _, given in requests for item in sorted(given.items())],
    }
    return json.dumps(values, sort_keys=True)


def check_bundle(folder: Path, manifest: Manifest, name: str) -> None:
    """Refuse to keep a damaged bundle: what is kept outlives it, under the sound one's name."""
    for file in sources(manifest, name):
        if sha256(bundle_file(folder, file)) != manifest.files[file].sha256:
            raise BundleError(
                f"{folder / file} is not what was written when the bundle was built",
                fix="copy the bundle again, or build it again with `eptc export`",
            )


def _is_sound(entry: Path, identity: str) -> bool:
    """Whether a kept graph is there, this user's alone, and as it was written."""
    try:
        status = entry.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "is not a folder of this user")
    if status.st_mode & _OTHERS_WRITE:
        raise PermissionError(errno.EPERM, "can be written by other users")
    try:
        data = json.loads((entry / _ENTRY).read_bytes())
        unchanged = [_is_unchanged(entry / file, data["files"][file]) for file in _FILES]
        return all(unchanged) and bool(data["identity"] == identity)
    except (KeyError, TypeError, ValueError, FileNotFoundError):
        return False


def _is_unchanged(path: Path, record: Any) -> bool:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != record["size"]:
        return False
    # Reading gigabytes at every load would cost what is saved: only where somebody has written.
    return bool(status.st_mtime_ns == record["mtime_ns"] or sha256(path) == record["sha256"])


def _make(
    entry: Path,
    identity: str,
    path: Path,
    requests: Sequence[Request],
    threads: int,
    *,
    fuse: bool,
) -> None:
    """Write a kept graph and publish it."""
    cache = entry.parent
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = cache.stat()
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, "other users may rename what is in it")
    _remove_abandoned(cache)
    made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=cache))  # this user's alone
    try:
        _save(path, made / _GRAPH, requests, threads, fuse=fuse)
        # What does not load again is never published.
        open_session(made / _GRAPH, requests, threads, optimize=False)
        records = {file: _record(made / file) for file in _FILES}
        text = json.dumps({"identity": identity, "files": records}, indent=2)
        (made / _ENTRY).write_text(text, "utf-8")
        for file in (*_FILES, _ENTRY):
            sync(made / file)
        _publish(made, entry, identity)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _save(
    path: Path, graph: Path, requests: Sequence[Request], threads: int, *, fuse: bool
) -> None:
    """Write a graph as it will run, such that its weights can be mapped.

    ONNX Runtime writes tensors one after the other, aligned from 1 MB on, and reads packed ones
    with instructions that crash on other addresses than multiples of 64. A size that is not such
    a multiple pushes all that follow off: then small tensors stay in the graph's own file, which
    is not mapped.
    """
    for smallest in _SMALLEST_MAPPED:
        for file in _FILES:
            (graph.parent / file).unlink(missing_ok=True)
        open_session(path, requests, threads, fuse=fuse, save_as=graph, external_from=smallest)
        offsets = _offsets(graph.read_bytes())
        if offsets and all(offset % _ALIGNMENT == 0 for offset in offsets):
            return
    raise OSError(errno.EINVAL, "its weights have sizes that cannot be mapped")


def _offsets(graph: bytes) -> list[int]:
    """Return where tensors, plain and packed, start in the data file.

    They are strings in the graph's protocol buffer: the key `offset` with a number, the key
    `prepacked_N` with `KERNEL|OFFSET;LENGTH;CHECKSUM|...`.
    """
    values = [match[1] for match in re.finditer(rb"\x0a\x06offset\x12.([0-9]+)", graph, re.S)]
    for match in re.finditer(rb"prepacked_[0-9]+\x12[\x00-\xff]{1,2}?([ -~]+)", graph):
        values += re.findall(rb"\|([0-9]+);", match[1])
    return [int(value) for value in values]


def _record(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256(path),
    }


def _publish(made: Path, entry: Path, identity: str) -> None:
    try:
        made.rename(entry)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if _is_sound(entry, identity):
            return  # another process was first
        # In two steps, so that whoever reads it finds all of it or nothing.
        entry.rename(made.with_name(f"{made.name}-damaged"))
        made.rename(entry)
        shutil.rmtree(made.with_name(f"{made.name}-damaged"), ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove what a killed process left."""
    for path in cache.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)
