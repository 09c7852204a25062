"""Both sides of a comparison: a bundle and its reference, each part loaded when it is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc.errors import EptcError, OptionError
from eptc.nn.adapted import ReferenceModel
from eptc.nn.frozen import frozen
from eptc.pair import Pair
from eptc.parity_gate.batches import seeded_probes, text_probe, texts_by_probe
from eptc.parity_gate.compare import Bound, Comparison, bound_of
from eptc.parity_gate.gate import bound_on, with_outcomes
from eptc.parity_gate.outputs import Decision, check_outputs
from eptc.parity_gate.probes import Example, Probe
from eptc.parity_gate.reference import frozen_gates, stream_reference
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.verifier import LocalVerifier
from eptc.runtime import Engine, verify
from eptc.runtime.verify import VerifyReport
from eptc.tasks import resolve

__all__ = ["BothSides", "Limits", "NotCheckedError"]

Outcomes = tuple[Probe, Sequence[Comparison | Decision]]


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
        self._outcomes: dict[str, Outcomes | EptcError] = {}
        self.by_block: ParityReport | None = None
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Free the engine and the reference."""
        self._stack.close()

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
    def _engine(self) -> Engine:
        return self._stack.enter_context(Engine.load(self.comparable, **self.pair.engine_options))

    @functools.cached_property
    def _texts(self) -> dict[str, list[Example]]:
        """The rows of each probe of text; none where both sides have no tokenizer."""
        if self.verifier.tokenizer is None or self.pair.manifest.tokenizer is None:
            return {}
        return texts_by_probe(self.pair.task, self.pair.examples)

    @functools.cached_property
    def _seeded(self) -> dict[str, Probe]:
        """The probes of seeded tokens; the base's weights are read only where they must be."""
        try:
            model = stream_reference(self.pair.source).model
        except OptionError:  # such a reference is in memory as a whole or not at all
            model = self.verifier.reference
        return {probe.name: probe for probe in seeded_probes(self.pair.manifest, model)}

    @property
    def probes(self) -> list[str]:
        """Names of the probes, in the order of `eptc.parity`."""
        return [*self._texts, *self._seeded]

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
    def whole(self) -> Iterator[tuple[Engine, ReferenceModel, int]]:
        """Yield engine and reference, both in memory as wholes, and the task's id.

        Raises:
            NotCheckedError: there is no reference, or it does not fit.
        """
        if self.opened().by_block:
            raise NotCheckedError("the model is compared block by block: see blocks")
        reference = self.verifier.reference
        with frozen(reference, frozen_gates(self.pair.manifest)):
            yield self._engine, reference, resolve(self.pair.task.name, reference.tasks)

    def outcomes(self, name: str) -> Outcomes:
        """Return a probe and what was found on it; it runs once.

        Raises:
            EptcError: the engine does not run on it.
            NotCheckedError: as for `whole`.
        """
        if name not in self._outcomes:
            with self.whole() as (engine, reference, _):
                try:
                    self._outcomes[name] = self._run(name, engine, reference)
                except EptcError as error:
                    self._outcomes[name] = error
        found = self._outcomes[name]
        if isinstance(found, EptcError):
            raise found
        return found

    def report(self) -> ParityReport | None:
        """Return what the probes that were run came to; None where none was."""
        ran = [found for found in self._outcomes.values() if not isinstance(found, EptcError)]
        if not ran:
            return self.by_block
        report = ParityReport((), self.bound, {}, 0.0, (), (), 0)
        for probe, outcomes in ran:
            report = with_outcomes(report, probe, outcomes)
        return report

    def _run(self, name: str, engine: Engine, reference: ReferenceModel) -> Outcomes:
        texts = self._texts.get(name)
        probe = self._seeded[name] if texts is None else text_probe(engine, name, texts)
        bound = bound_on(probe, self.bound, has_text=bool(self._texts))
        return probe, list(check_outputs(engine, reference, self.pair.task.name, probe, bound))
