"""The bundle in use, and what happens when another one is placed where it came from."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
from typing import TYPE_CHECKING

from eptc.errors import BundleError
from eptc.runtime import MANIFEST, Engine, verify

if TYPE_CHECKING:
    from pathlib import Path

    from service.metrics import Metrics
    from service.settings import Settings

__all__ = ["Live", "Loaded"]

logger = logging.getLogger("uvicorn.error")

State = tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An engine, and the SHA-256 of its manifest, which lists the hash of every other file."""

    engine: Engine
    sha256: str


class Live:
    """The engine in use; `watch` replaces it.

    A batch under way keeps the engine it began with, so nothing waits for a swap and nothing is
    lost by one. While a new bundle is tried both are in memory.

    Attributes:
        current: what answers now.
        rejected: why the bundle that lies there is not in use; None where it is.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Load the first bundle; raises EptcError or OSError where it cannot be used."""
        self._settings = settings
        self._metrics = metrics
        self._asked = asyncio.Event()
        self.rejected: str | None = None
        self._seen: State | None = _state(settings.bundle)
        self.current = _load(settings)
        self._describe()

    def look(self) -> None:
        """Try what lies there now, even if it was rejected before."""
        self._seen = None
        self._asked.set()

    async def watch(self) -> None:
        """Look for another bundle from time to time and when asked to, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.watch_seconds or None):
                    await self._asked.wait()
            self._asked.clear()
            state = await asyncio.to_thread(_state, self._settings.bundle)
            if state != self._seen:
                self._seen = state
                await self._try()

    async def _try(self) -> None:
        try:
            loaded = await asyncio.to_thread(_load, self._settings, self.current)
        except Exception as error:  # noqa: BLE001  # whatever it is, the old engine goes on
            logger.error("the bundle in use stays: %s", error)
            self.rejected = str(error)
            self._metrics.reloads.labels("rejected").inc()
        else:
            logger.info("bundle %s replaces %s", loaded.sha256, self.current.sha256)
            self.rejected = None
            self.current = loaded
            self._metrics.reloads.labels("swapped").inc()
        self._describe()

    def _describe(self) -> None:
        engine = self.current.engine
        self._metrics.rejected.set(self.rejected is not None)
        self._metrics.bundle.info({
            "sha256": self.current.sha256,
            "tasks": ",".join(task.name for task in engine.tasks),
            "precision": engine.manifest.precision,
        })  # fmt: skip


def _load(settings: Settings, old: Loaded | None = None) -> Loaded:
    """Verify and load what lies there, and run it once."""
    folder = settings.bundle.resolve(strict=True)  # one folder, even if a link moves on
    before = _state(folder)
    verify(folder).raise_for_problems()
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    engine = Engine.load(folder, settings.providers, settings.threads, warm_up=True)
    if _state(folder) != before:
        raise BundleError("the bundle was replaced while it was read")
    if old is not None and _promised(engine) != _promised(old.engine):
        raise BundleError(
            f"the bundle is for {_promised(engine)}", expected=f"one for {_promised(old.engine)}"
        )
    return Loaded(engine, digest)


def _promised(engine: Engine) -> list[tuple[object, ...]]:
    """Return what callers rely on of each task; prompt and lengths may change with a model."""
    return [(task.name, task.kind, task.fields, task.labels) for task in engine.tasks]


def _state(folder: Path) -> State:
    """Return what changes when a bundle is placed, replaced or removed."""
    try:
        files = sorted(folder.resolve().iterdir())
        found = [(path, path.stat()) for path in files]
    except (OSError, RuntimeError) as error:  # the latter: a link that leads to itself
        return (str(error),)
    return tuple((p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found)
