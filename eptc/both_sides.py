"""Both sides of a comparison: a bundle and its reference, each part loaded when it is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eptc.errors import EptcError
from eptc.nn.adapted import ReferenceModel
from eptc.nn.frozen import frozen
from eptc.pair import Pair
from eptc.parity_gate.compare import Bound, bound_of
from eptc.parity_gate.reference import frozen_gates
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.verifier import LocalVerifier
from eptc.parts import MixedPart, Part, TaskPart
from eptc.runtime import Engine, verify
from eptc.runtime.manifest import Manifest, read_manifest
from eptc.runtime.verify import VerifyReport

__all__ = ["BothSides", "Limits", "NotCheckedError"]


class NotCheckedError(Exception):
    """A check that does not apply, or that another one stands in the way of; says why."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a user allows instead of what the bundle's precision or its build does.

    Args:
        relative: how far an output may be off, as a part of the tensor's largest element.
        cosine: smallest cosine between an output and the reference's.
        max_drop: points (hundredths) of the task's metric that may be lost on data.
        max_flips: share of the rows of data whose label may change where the reference is sure.
    """

    relative: float | None = None
    cosine: float | None = None
    max_drop: float | None = None
    max_flips: float | None = None


class BothSides:
    """A bundle and its reference; what was loaded once stays until it is closed.

    Args:
        bundle: the bundle's folder.
        limits: what is allowed instead of what the bundle says.
        options: the reference and how to read it, as for `eptc.parity`.

    Attributes:
        by_block: what comparing block by block came to, once it was done.
    """

    def __init__(self, bundle: Path, limits: Limits, options: Mapping[str, Any]) -> None:
        self.folder = bundle
        self.limits = limits
        self._options = options
        self.by_block: ParityReport | None = None
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Free the engine and the reference."""
        self._stack.close()

    def manifest(self) -> Manifest:
        """Return what the bundle says of itself, whatever there is to compare it with.

        Raises:
            BundleError: it cannot be read.
        """
        return read_manifest(self.folder)

    @functools.cached_property
    def pair(self) -> Pair:
        """The bundle and its checkpoint, read."""
        return Pair.open(self.folder, **self._options)

    @functools.cached_property
    def verified(self) -> VerifyReport:
        """What `eptc verify` finds."""
        return verify(self.folder)

    @functools.cached_property
    def verifier(self) -> LocalVerifier:
        """The reference side."""
        return self._stack.enter_context(
            contextlib.closing(LocalVerifier(self.pair.subject, self.pair.engine_options))
        )

    @functools.cached_property
    def comparable(self) -> Path:
        """The folder that is compared (`Pair.comparable`)."""
        return self._stack.enter_context(self.pair.comparable())

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine, of every task it serves."""
        return self._stack.enter_context(Engine.load(self.comparable, **self.pair.engine_options))

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether both sides have a tokenizer."""
        return None not in (self.verifier.tokenizer, self.pair.manifest.tokenizer)

    @functools.cached_property
    def parts(self) -> list[Part]:
        """What is compared by itself.

        Raises:
            NotCheckedError: there is no reference.
        """
        pair = self.opened()
        if not pair.manifest.tasks:
            return [TaskPart(self, "", pair.task)]
        tasks = [TaskPart(self, task.name, task) for task in pair.tasks]
        return [*tasks, MixedPart(self, "tasks side by side", tasks)]

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, Any]] | None:
        """How both sides answer the labelled examples, by task (`Pair.scores`)."""
        return self.pair.scores(self.comparable, self.verifier)

    @property
    def bound(self) -> Bound:
        """How far outputs may be off on text."""
        bound, limits = bound_of(self.pair.manifest.precision), self.limits
        if limits.relative is not None:
            bound = dataclasses.replace(bound, relative=limits.relative, why="as configured")
        if limits.cosine is not None:
            bound = dataclasses.replace(bound, cosine=limits.cosine)
        return bound

    def opened(self) -> Pair:
        """Return the pair; raises NotCheckedError where `pair` raises what `origin` reports."""
        try:
            return self.pair
        except EptcError as error:
            raise NotCheckedError("there is no reference to compare with: see origin") from error

    @contextlib.contextmanager
    def whole(self) -> Iterator[tuple[Engine, ReferenceModel]]:
        """Yield engine and reference, both in memory as wholes.

        Raises:
            NotCheckedError: there is no reference, or it does not fit.
        """
        if self.opened().by_block:
            raise NotCheckedError("the model is compared block by block: see blocks")
        reference = self.verifier.reference
        with frozen(reference, frozen_gates(self.pair.manifest)):
            yield self.engine, reference

    def report(self) -> ParityReport | None:
        """Return what the probes that were run came to; None where none was."""
        try:
            parts = self.parts
        except NotCheckedError:
            return None
        found = {part.name: part.report() for part in parts}
        ran = {name: report for name, report in found.items() if report is not None}
        if not ran:
            return self.by_block
        if len(parts) == 1:
            return ran[parts[0].name]
        mixed = ran.pop(parts[-1].name, None)
        return ParityReport((), self.bound, {}, 0.0, (), (), 0).of_tasks(ran, mixed)
