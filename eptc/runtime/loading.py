"""Opening every graph of a bundle, on the best providers that start, once in a process."""

from __future__ import annotations

import json
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from eptc.errors import BundleError, OptionError
from eptc.runtime.engine_sessions import open_with_engines
from eptc.runtime.graph import Graph
from eptc.runtime.manifest import Manifest, bundle_file
from eptc.runtime.prepacked import open_prepacked
from eptc.runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from eptc.runtime.providers import Request

__all__ = ["on_best", "open_graphs", "open_tokenizer", "written"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Engines of one bundle share its sessions and its tokenizer, which any thread may use: a second
# one costs nothing. The last engine that is closed or collected frees them. Two threads that open
# a graph at the same moment both do, and one of them is kept: no lock, which a fork could find
# held.
_graphs: weakref.WeakValueDictionary[tuple[Any, ...], Graph] = weakref.WeakValueDictionary()
_tokenizers: weakref.WeakValueDictionary[tuple[Any, ...], TextTokenizer] = (
    weakref.WeakValueDictionary()
)


def open_graphs(
    folder: Path,
    manifest: Manifest,
    requests: Sequence[Request],
    threads: int,
    *,
    strict: bool,
    cache: Path | None = None,
    allow_fallback: bool = False,
) -> dict[str, Graph]:
    """Open every graph; unless `strict`, go on without a provider that fails after all.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.
        requests: providers in order of preference.
        threads: threads one operator may use.
        strict: whether a provider that fails is an error.
        cache: where optimised graphs are kept; None: nowhere.
        allow_fallback: whether nodes that the first provider cannot run may run on the CPU.

    Raises:
        BundleError: a graph that does not load or differs from the manifest.
        OptionError: a provider that was asked for did not start, or does not run a graph.
    """

    def opened(requests: Sequence[Request]) -> dict[str, Graph]:
        return {
            name: _open(folder, manifest, name, requests, threads, cache, allow_fallback)
            for name in manifest.graphs
        }

    return on_best(requests, opened, strict=strict)


def on_best(
    requests: Sequence[Request], opened: Callable[[Sequence[Request]], T], *, strict: bool
) -> T:
    """Return what opens on providers; unless `strict`, go on without one that fails after all.

    Args:
        requests: providers in order of preference.
        opened: opens on them.
        strict: whether a provider that fails is an error.
    """
    try:
        return opened(requests)
    except (BundleError, OptionError) as error:
        if strict or len(requests) < 2:
            raise
        logger.warning("going on without %s: %s", requests[0][0], error)
        return on_best(requests[1:], opened, strict=strict)


def _open(
    folder: Path,
    manifest: Manifest,
    name: str,
    requests: Sequence[Request],
    threads: int,
    cache: Path | None,
    allow_fallback: bool,
) -> Graph:
    spec = manifest.graphs[name]
    files = written(folder, sorted(manifest.files))
    options = json.dumps(list(requests), sort_keys=True, default=str)
    key = (os.getpid(), name, spec, files, options, threads, cache, allow_fallback)
    graph = _graphs.get(key)
    if graph is None:
        session = None
        if cache is not None:
            session = open_prepacked(cache, folder, manifest, name, requests, threads)
        if session is None:
            session = open_with_engines(
                folder, manifest, name, requests, threads, allow_fallback=allow_fallback
            )
        graph = _graphs.setdefault(key, Graph(name, spec, session))
    return graph


def open_tokenizer(folder: Path, manifest: Manifest) -> TextTokenizer | None:
    """Open the bundle's tokenizer; None where it has none.

    Raises:
        BundleError: the file cannot be read.
    """
    spec = manifest.tokenizer
    if spec is None:
        return None
    limits = sorted({task.max_length for task in manifest.tasks if task.max_length is not None})
    if spec.max_length is not None:
        limits = [limit for limit in limits if limit < spec.max_length]
    described = json.dumps([spec.to_json(), limits], sort_keys=True)
    key = (os.getpid(), described, written(folder, [spec.file]))
    tokenizer = _tokenizers.get(key)
    if tokenizer is None:
        path = bundle_file(folder, spec.file)
        tokenizer = _tokenizers.setdefault(key, TextTokenizer(path, spec, limits))
    return tokenizer


def written(folder: Path, files: Sequence[str]) -> tuple[tuple[int, int, int, int], ...]:
    """Return what changes where one of the files is written or replaced."""
    found = [bundle_file(folder, file).stat() for file in files]
    return tuple((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns) for file in found)
