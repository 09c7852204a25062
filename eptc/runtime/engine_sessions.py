"""Sessions of a bundle's graphs: with TensorRT's engines where they are kept, or without any."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from eptc.errors import BundleError, OptionError
from eptc.runtime.engine_cache import Kept, keep, publish, this_builder
from eptc.runtime.manifest import bundle_file
from eptc.runtime.prepacked import check_bundle
from eptc.runtime.providers import TENSORRT
from eptc.runtime.session import open_session
from eptc.runtime.tensorrt import TensorRtOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eptc.runtime.manifest import Manifest
    from eptc.runtime.providers import Request

__all__ = ["open_with_engines", "uncached"]


def open_with_engines(
    folder: Path,
    manifest: Manifest,
    name: str,
    requests: Sequence[Request],
    threads: int,
    *,
    allow_fallback: bool = False,
) -> Any:
    """Open a graph's session, with engines that are kept where TensorRT is told to keep them.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.
        name: the graph.
        requests: providers in order of preference.
        threads: threads one operator may use.
        allow_fallback: as for `open_session`.

    Raises:
        BundleError: the graph cannot be loaded.
        OptionError: as `keep` and `open_session`; a folder that cannot be written.
    """
    given = dict(requests).get(TENSORRT)
    kept = Kept(bundle_file(folder, manifest.graphs[name].file), {})
    if given is not None:
        settings = TensorRtOptions.read(given)
        if settings.cache is None and settings.context is None:
            spec = manifest.graphs[name]
            options = settings.for_graph(folder, name, spec, manifest.precision)
            kept = dataclasses.replace(kept, options=options)
        else:
            kept = keep(settings, folder, manifest, name, this_builder(settings.device))
            if kept.record is not None:
                check_bundle(folder, manifest, name)
    own = [(n, dict(kept.options) if n == TENSORRT else options) for n, options in requests]
    try:
        session = open_session(
            kept.graph, own, threads, fuse=manifest.fusible, allow_fallback=allow_fallback
        )
    except BundleError as error:
        if kept.engine is None:
            raise
        raise BundleError(
            error.found,
            fix=f"remove {kept.engine}: a process that was killed may have left half an engine, "
            "and it is built again",
        ) from error
    else:
        if kept.context is not None and kept.record is not None:
            publish(name, kept.context, kept.record)
        return session
    finally:
        if kept.context is not None:
            kept.context.unfinished.unlink(missing_ok=True)


def uncached(requests: Sequence[Request], precision: str) -> list[Request]:
    """Return requests for a session whose weights are not a bundle's: no engine of it is kept.

    Args:
        requests: providers in order of preference.
        precision: of the weights.

    Raises:
        OptionError: engines were to be kept.
    """
    found = []
    for name, options in requests:
        own = dict(options)
        if name == TENSORRT:
            settings = TensorRtOptions.read(options)
            if settings.cache or settings.context or settings.profiles:
                raise OptionError(
                    "engines of a folded task cannot be kept: its weights are in no file",
                    fix="leave 'cache', 'context' and 'profiles' out, or load a bundle",
                )
            own = settings.for_any(precision)
        found.append((name, own))
    return found
