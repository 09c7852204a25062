"""Packages that extend eptc: found by their entry points, imported when they are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypeVar

from eptc.errors import EptcError, InternalError, PluginError

__all__ = ["GROUPS", "Group", "Plugin", "find_plugin", "installed"]

T = TypeVar("T")

Group = Literal["eptc.readers", "eptc.passes", "eptc.targets"]

# What one of each group is called.
GROUPS: dict[Group, str] = {
    "eptc.readers": "reader",
    "eptc.passes": "pass",
    "eptc.targets": "target",
}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Args:
        group: what it adds to.
        name: what it is called.
        value: where it is, `module:attribute`.
        distribution: the package, as pip calls it.
        version: the package's.
    """

    group: Group
    name: str
    value: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def load(self) -> Any:
        """Import it; raise PluginError where that fails."""
        with self.blamed("it cannot be imported"):
            return importlib.metadata.EntryPoint(self.name, self.value, self.group).load()

    def make(self, kind: type[T]) -> T:
        """Return an object of a kind: the entry point's own, or one of its class.

        Raises:
            PluginError: there is none, or it calls itself otherwise.
        """
        found = self.load()
        if isinstance(found, type):
            with self.blamed(f"{found.__name__}() fails"):
                found = found()
        if not isinstance(found, kind):
            raise self.error(f"it is a {type(found).__name__}, not a {kind.__name__}")
        if (name := getattr(found, "name", None)) != self.name:
            raise self.error(f"it calls itself {name!r}")
        return found

    def refuse_taken(self, names: Collection[str]) -> None:
        """Raise PluginError where its name is one of eptc's own."""
        if self.name in names:
            raise self.error(f"the name is taken by a {GROUPS[self.group]} of eptc's own")

    @contextlib.contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """Say of an unexpected error whose it is; what is raised for the user passes."""
        try:
            yield
        except InternalError as error:
            raise self.error(f"{what}: {error.found}") from error
        except (EptcError, MemoryError):
            raise
        except Exception as error:  # somebody else's code: anything may come out of it
            raise self.error(f"{what}: {type(error).__name__}: {error}") from error

    def error(self, why: str) -> PluginError:
        """Return an error that names the entry point and its package."""
        return PluginError(
            f"the {GROUPS[self.group]} {self.name!r} of {self} ({self.value}): {why}",
            fix=f"update or uninstall {self.distribution}, or report it to its authors",
        )


def installed(group: Group) -> list[Plugin]:
    """Return the entry points of a group by name, none of them imported."""
    found = []
    for entry in importlib.metadata.entry_points(group=group):
        assert entry.dist is not None
        package = entry.dist.metadata["Name"]
        found.append(Plugin(group, entry.name, entry.value, package, entry.dist.version))
    return sorted(found, key=lambda plugin: (plugin.name, plugin.distribution))


def find_plugin(group: Group, name: str) -> Plugin | None:
    """Return the entry point of a name; None where there is none.

    Raises:
        PluginError: several packages have one of that name.
    """
    found = [plugin for plugin in installed(group) if plugin.name == name]
    if len(found) > 1:
        packages = [str(plugin) for plugin in found]
        raise PluginError(
            f"the {GROUPS[group]} {name!r} is in {' and in '.join(packages)}",
            expected="one package that has it",
            fix="uninstall the others",
        )
    return found[0] if found else None
