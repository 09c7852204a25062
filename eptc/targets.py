"""What is written: an engine, and what a target adds beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

from eptc import bundle
from eptc.errors import BundleError, EptcError, InternalError, OptionError
from eptc.plugins import Plugin, find_plugin, installed
from eptc.precision_plan import FILE as PLAN
from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import MANIFEST, file_name
from eptc.target_base import Target
from eptc.tensorrt.target import TensorRT

__all__ = ["TARGETS", "Aim", "Onnx", "Target", "find_target", "installed_target"]


# Files that only some bundles have, and what they say would be believed.
_RESERVED = {MANIFEST, PLAN, "parity.json"}


class Onnx(Target):
    """The bundle alone, for ONNX Runtime."""

    name = "onnx"

    def add(self, directory: Path, manifest: Manifest, out: Path) -> None:
        """Add nothing."""


TARGETS: dict[str, Target] = {target.name: target for target in (Onnx(), TensorRT())}


@dataclasses.dataclass(frozen=True)
class Aim:
    """A target and where it comes from.

    Args:
        target: the target.
        plugin: its entry point; None for one of eptc's own.
    """

    target: Target
    plugin: Plugin | None = None

    def add(self, directory: Path, manifest: Manifest) -> Manifest:
        """Let the target write beside a finished bundle; return the manifest of both.

        Raises:
            PluginError: an installed target fails, or does what it may not.
        """
        written = Path(tempfile.mkdtemp(dir=directory))
        before = _state(directory)
        blamed = (
            contextlib.nullcontext() if self.plugin is None else self.plugin.blamed("it fails")
        )
        with blamed:
            self.target.add(directory, manifest, written)
        if changed := _state(directory) ^ before:
            names = sorted({name for name, *_ in changed})
            raise self._error(f"it changed {names[0]} beside its own folder")
        taken = {path.name.lower() for path in directory.iterdir()} | _RESERVED
        for path in sorted(written.iterdir()):
            if why := _misplaced(path, taken):
                raise self._error(f"it wrote {path.name!r}, {why}")
            path.rename(directory / path.name)
        shutil.rmtree(written)
        return bundle.write_manifest(
            directory, dataclasses.replace(manifest, target=self.target.name)
        )

    def _error(self, why: str) -> EptcError:
        if self.plugin is None:
            return InternalError(f"the target {self.target.name}: {why}")
        return self.plugin.error(why)


def find_target(name: str) -> Aim:
    """Return a target by its name: one of eptc's own, else an installed one.

    Raises:
        OptionError: there is none of that name.
        PluginError: the package that has it cannot be used.
    """
    # Which ask for options, and so for this.
    from eptc.interop.targets import FOLDER_TARGETS
    from eptc.interop.triton import REPOSITORIES

    if name in TARGETS:
        return Aim(TARGETS[name])
    if name in FOLDER_TARGETS:
        raise OptionError(
            f"an engine was asked for, and --target {name} writes none",
            expected="--target " + " or ".join(TARGETS),
        )
    if name in REPOSITORIES:
        raise OptionError(
            f"one engine was asked for, and --target {name} arranges engines in a folder",
            expected="--target " + " or ".join(TARGETS),
        )
    plugin = find_plugin("eptc.targets", name)
    if plugin is None:
        names = [
            *TARGETS,
            *FOLDER_TARGETS,
            *REPOSITORIES,
            *(p.name for p in installed("eptc.targets") if p.name not in TARGETS),
        ]
        raise OptionError(f"the target is {name!r}", expected=" or ".join(names))
    return Aim(installed_target(plugin), plugin)


def installed_target(plugin: Plugin) -> Target:
    """Return the target of an entry point; raise PluginError where it cannot be used."""
    from eptc.interop.targets import FOLDER_TARGETS
    from eptc.interop.triton import REPOSITORIES

    plugin.refuse_taken({*TARGETS, *FOLDER_TARGETS, *REPOSITORIES})
    return plugin.make(Target)  # type: ignore[type-abstract]


def _state(directory: Path) -> set[tuple[str, int, int, int]]:
    """Return name, size, time and number of each file: what writing to one changes."""
    found = set()
    for path in directory.iterdir():
        status = path.lstat()
        sizes = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
        found.add((path.name, *sizes, status.st_ino))
    return found


def _misplaced(path: Path, taken: set[str]) -> str | None:
    """Return why a file cannot become one of the bundle's."""
    if path.is_symlink() or not path.is_file():
        return "which is no plain file"
    if path.name.lower() in taken:
        return "which is a name of the bundle's own"
    try:
        file_name(path.name, "a target")
    except BundleError as error:
        return error.found
    return None
