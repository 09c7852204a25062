"""One build of a plan, wherever it runs: claimed, resumed, published once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eptc import bundle
from eptc.build import export
from eptc.builds.inputs import environment
from eptc.builds.outcome import Outcome, failed
from eptc.builds.plan import Build
from eptc.builds.state import Place, Record, folder_hashes, whole
from eptc.errors import OptionError

__all__ = ["Order", "run_order"]


@dataclasses.dataclass(frozen=True)
class Order:
    """A build as it is handed to whoever makes it.

    Args:
        build: what is built.
        root: the plan's root.
        key: hash of everything it depends on.
        environment: hash of what is to build it.
        force: whether what lies at its place may be replaced, whosever it is.
    """

    build: Build
    root: Path
    key: str
    environment: str
    force: bool = False

    @property
    def done(self) -> bool:
        """Whether it was built already: whole, and of the same inputs."""
        record = Place(self.root, self.build.name).read()
        return (
            record is not None
            and (record.state, record.key) == ("done", self.key)
            and whole(self.build.out, record)
        )


def run_order(order: Order, progress: Callable[[Any], None] = lambda _: None) -> Outcome:
    """Make one build, or keep what is there; an error becomes its outcome.

    Who makes the same build in another process is waited for, and what it made is kept.
    """
    start, build = time.perf_counter(), order.build
    try:
        if order.environment != environment():
            raise OptionError(
                "another version of eptc, or of what it builds with, is installed here",
                expected="the same packages on every machine",
            )
        place = Place(order.root, build.name)
        with place.claimed(lambda: progress("wait for another build of the same")):
            if order.done:
                return Outcome(build.name, build.out, "kept", size=_size(build.out))
            # Only what a plan built, whole or not, may be replaced unasked.
            before, there = place.read(), _number(build.out)
            bundle.check_place(build.out, force=order.force or before is not None)
            place.write(Record("building", order.key))
            try:
                found = export(**build.recipe.arguments, force=True, progress=progress)
            except Exception:
                if _number(build.out) == there:
                    place.restore(before)
                raise
            place.write(Record("done", order.key, folder_hashes(build.out)))
    except Exception as error:  # noqa: BLE001  # a bug in one build is no reason to give up the others
        return failed(build.name, build.out, error, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Outcome(
        build.name, build.out, "built", seconds, _size(build.out), warnings=tuple(found.warnings)
    )


def _number(folder: Path) -> int | None:
    """Return the file system's number of a folder, which is another once one was published."""
    return folder.stat().st_ino if folder.exists() else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
