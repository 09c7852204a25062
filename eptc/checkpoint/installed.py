"""Formats that other packages bring: entry points of the group `eptc.readers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Contents, ReadOptions
from eptc.checkpoint.formats import FORMATS, Format, find_format
from eptc.errors import PluginError
from eptc.plugins import Plugin, find_plugin, installed
from eptc.tasks import Task

if TYPE_CHECKING:
    from eptc.nn.adapted import ReferenceModel
    from eptc.nn.streamed import StreamedModel

__all__ = ["InstalledFormat", "find_installed", "installed_format", "installed_names", "matching"]


class InstalledFormat(Format):
    """A format of another package: what goes wrong in it is said to be its own.

    Args:
        plugin: where it comes from.
        inner: the package's format.
    """

    def __init__(self, plugin: Plugin, inner: Format) -> None:
        self.name = plugin.name
        self.plugin = plugin
        self.describes_tasks = bool(inner.describes_tasks)
        self._from, self._inner = plugin, inner

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # Another process finds the package by itself; the format need not be picklable.
        return find_format, (self.name,)

    def matches(self, path: Path) -> bool:
        """Whether a folder is of this format, as far as a glance tells."""
        with self._from.blamed(f"it cannot tell whether {path} is one"):
            return bool(self._inner.matches(path))

    def read(self, path: Path, base: BaseModel, options: ReadOptions) -> Contents:
        """Read a folder."""
        with self._from.blamed(f"it cannot read {path}"):
            found = self._inner.read(path, base, options)
        if not isinstance(found, Contents):
            raise self._from.error(f"it reads a {type(found).__name__}, not Contents")
        return dataclasses.replace(found, format=self.name)

    def reference(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> ReferenceModel:
        """Return the PyTorch model."""
        from eptc.nn.adapted import ReferenceModel

        with self._from.blamed(f"its reference of {path} cannot be made"):
            found = self._inner.reference(path, base, options, tasks)
        if not isinstance(found, ReferenceModel):
            raise self._from.error(f"its reference is a {type(found).__name__}")
        return found.eval()

    def stream(
        self, path: Path, base: Path, options: ReadOptions, tasks: Sequence[Task]
    ) -> StreamedModel:
        """Return the PyTorch model on a base that stays on disk."""
        with self._from.blamed(f"its reference of {path} cannot be made"):
            return self._inner.stream(path, base, options, tasks)

    def blamed(self, what: str) -> AbstractContextManager[None]:
        """Say of an unexpected error that it is this format's."""
        return self._from.blamed(what)

    def base_name(self, path: Path) -> str | None:
        """Return what a checkpoint calls its base, as far as it says."""
        with self._from.blamed(f"it cannot tell the base of {path}"):
            return self._inner.base_name(path)


def installed_names() -> list[str]:
    """Return the names of installed formats, none of them imported."""
    return [plugin.name for plugin in installed("eptc.readers") if plugin.name not in FORMATS]


def installed_format(plugin: Plugin) -> Format:
    """Return the format of an entry point; raise PluginError where it cannot be used."""
    plugin.refuse_taken(FORMATS)
    return InstalledFormat(plugin, plugin.make(Format))  # type: ignore[type-abstract]


def find_installed(name: str) -> Format | None:
    """Return an installed format; None where there is none of that name.

    Raises:
        PluginError: it cannot be used, or two packages have it.
    """
    plugin = find_plugin("eptc.readers", name)
    return None if plugin is None else installed_format(plugin)


def matching(path: Path) -> tuple[list[Format], list[str]]:
    """Return the installed formats that a folder looks like, and why others could not be asked."""
    found, unusable = [], []
    for name in dict.fromkeys(plugin.name for plugin in installed("eptc.readers")):
        try:
            entry = find_installed(name)
            if entry is not None and entry.matches(path):
                found.append(entry)
        except PluginError as error:
            unusable.append(error.found)
    return found, unusable
