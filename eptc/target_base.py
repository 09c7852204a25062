"""What a target is: where an engine goes, and the files that are of use there."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import onnx_ir

from eptc.pass_base import GraphPass
from eptc.precision import OptimizeFor
from eptc.runtime.manifest import Manifest

if TYPE_CHECKING:  # which ask for targets
    from eptc.job import Job
    from eptc.options import Options

__all__ = ["Target"]


class Target(abc.ABC):
    """Where an engine goes: the bundle, and files that are of use there.

    Attributes:
        name: what `--target` and the manifest call it.
        optimize_for: the execution provider it is for; None: the caller chooses.
        graph_passes: exact passes that graphs for it go through beside the others.
    """

    name: str
    optimize_for: OptimizeFor | None = None
    graph_passes: tuple[GraphPass, ...] = ()

    def told(self, options: Options) -> Self:  # noqa: ARG002
        """Return the target as the options of a build say it: one of eptc's own may have some.

        Raises:
            OptionError: an option that it cannot have.
        """
        return self

    def check_graphs(  # noqa: B027  # most targets take every graph
        self, graphs: Mapping[str, onnx_ir.Model], job: Job
    ) -> None:
        """Check the graphs after their passes, before anything is written.

        Args:
            graphs: by role, their weights not read.
            job: the build.

        Raises:
            InputError: what there cannot be run.
        """

    def notes(self, manifest: Manifest) -> tuple[str, ...]:  # noqa: ARG002
        """Return what a user should know of an engine of this target."""
        return ()

    @abc.abstractmethod
    def add(self, directory: Path, manifest: Manifest, out: Path) -> None:
        """Write further files beside an engine that passed the gate.

        They become files of the bundle, hashed in its manifest. Nothing that depends on the
        clock, on paths or on chance belongs in them: two builds of one input are equal.

        Args:
            directory: the bundle; it stays as it is.
            manifest: its manifest, these files not yet in it.
            out: an empty folder to write into: plain files, no folders.

        Raises:
            InputError: what a user should know; nothing is published.
        """
