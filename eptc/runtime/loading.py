"""Opening every graph of a bundle, on the best providers that start."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from eptc.errors import BundleError, OptionError
from eptc.runtime.graph import Graph
from eptc.runtime.manifest import Manifest, bundle_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eptc.runtime.providers import Request

__all__ = ["default_threads", "open_graphs"]

logger = logging.getLogger(__name__)


def open_graphs(
    folder: Path, manifest: Manifest, requests: Sequence[Request], threads: int, *, strict: bool
) -> dict[str, Graph]:
    """Open every graph; unless `strict`, go on without a provider that fails after all."""
    try:
        return {
            name: Graph(name, spec, bundle_file(folder, spec.file), requests, threads)
            for name, spec in manifest.graphs.items()
        }
    except (BundleError, OptionError) as error:
        if strict or len(requests) < 2:
            raise
        logger.info("going on without %s: %s", requests[0][0], error)
        return open_graphs(folder, manifest, requests[1:], threads, strict=strict)


def default_threads() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
