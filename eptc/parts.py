"""What of an engine is compared by itself: each task, and batches whose rows are of several."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eptc.errors import EptcError, OptionError
from eptc.layer_errors import LayerError, layer_errors
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.batches import seeded_probes, text_probe, texts_by_probe
from eptc.parity_gate.compare import Comparison
from eptc.parity_gate.gate import bound_on, with_outcomes
from eptc.parity_gate.mixed import mixed_rows, mixed_seeds, mixed_text
from eptc.parity_gate.outputs import Decision, check_outputs
from eptc.parity_gate.probes import Example, Probe, builtin_examples
from eptc.parity_gate.reference import stream_reference
from eptc.parity_gate.report import ParityReport
from eptc.runtime import Engine
from eptc.tasks import Task, resolve

if TYPE_CHECKING:
    from eptc.both_sides import BothSides
    from eptc.pair import Pair

__all__ = ["MixedPart", "Outcomes", "Part", "TaskPart"]

Outcomes = tuple[Probe, Sequence[Comparison | Decision]]


class Part(abc.ABC):
    """One part of a comparison: probes, and what was found on them.

    Args:
        sides: the bundle and its reference.
        name: unique among the parts; empty where there is one.
    """

    def __init__(self, sides: BothSides, name: str) -> None:
        self.name = name
        self._sides = sides
        self._outcomes: dict[str, Outcomes | EptcError] = {}

    @property
    def probes(self) -> list[str]:
        """Names of the probes, in the order of `eptc.parity`; known before anything runs."""
        return [*self._texts, *self.seeded]

    def outcomes(self, name: str) -> Outcomes:
        """Return a probe and what was found on it; it runs once.

        Raises:
            EptcError: the engine does not run on it.
            NotCheckedError: as for `BothSides.whole`.
        """
        if name not in self._outcomes:
            with self._sides.whole() as (_, reference):
                try:
                    self._outcomes[name] = self._run(name, reference)
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
            return None
        report = ParityReport((), self._sides.bound, {}, 0.0, (), (), 0)
        for probe, outcomes in ran:
            report = with_outcomes(report, probe, outcomes)
        return report

    def layers(self, name: str) -> list[LayerError]:  # noqa: ARG002  # for those that have some
        """Return the error of every layer on a probe; none where layers have no counterpart.

        Raises:
            EptcError: the engine does not run on it.
            NotCheckedError: as for `BothSides.whole`.
        """
        return []

    @property
    @abc.abstractmethod
    def engine(self) -> Engine:
        """What runs."""

    @property
    @abc.abstractmethod
    def _asked(self) -> str | list[str]:
        """The task, as `check_outputs` has it."""

    @property
    @abc.abstractmethod
    def _texts(self) -> dict[str, list[Example]]:
        """The rows of each probe of text; none where both sides have no tokenizer."""

    @property
    @abc.abstractmethod
    def seeded(self) -> dict[str, Probe]:
        """The probes of seeded tokens."""

    @abc.abstractmethod
    def _text_probe(self, name: str) -> Probe:
        """Return a probe of text."""

    def _run(self, name: str, reference: ReferenceModel) -> Outcomes:
        probe = self._text_probe(name) if name in self._texts else self.seeded[name]
        bound = bound_on(probe, self._sides.bound, has_text=bool(self._texts))
        return probe, list(check_outputs(self.engine, reference, self._asked, probe, bound))


class TaskPart(Part):
    """One task of an engine, or its only one.

    Args:
        sides: the bundle and its reference.
        name: of the part.
        task: the task.
    """

    def __init__(self, sides: BothSides, name: str, task: Task) -> None:
        super().__init__(sides, name)
        self.task = task

    @property
    def pair(self) -> Pair:
        """The bundle beside its checkpoint."""
        return self._sides.pair

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine, as one of this task."""
        return self._sides.engine.for_task(self.task.name)

    @property
    def examples(self) -> Sequence[Example] | None:
        """The task's labelled examples; None where there are none."""
        return (self.pair.labelled or {}).get(self.task.name)

    def task_id(self, reference: ReferenceModel) -> int:
        """Return the task's position in the reference's list."""
        return resolve(self.task.name, reference.tasks)

    def layers(self, name: str) -> list[LayerError]:
        """Return the error of every layer on a probe (`Part.layers`)."""
        probe, _ = self.outcomes(name)
        asked: str | list[str] = self.task.name
        with self._sides.whole() as (engine, reference):
            if several := [task.name for task in engine.manifest.tasks]:
                place = several.index(self.task.name)
                ids = np.full(len(probe.input_ids), place, np.int64)
                asked, probe = several, dataclasses.replace(probe, task_ids=ids)
            return layer_errors(engine, reference, asked, probe, self._sides.bound)

    @property
    def _asked(self) -> str:
        return self.task.name

    @functools.cached_property
    def _texts(self) -> dict[str, list[Example]]:
        return texts_by_probe(self.task, self.examples) if self._sides.has_text else {}

    @functools.cached_property
    def seeded(self) -> dict[str, Probe]:
        """The probes of seeded tokens; the base's weights are read only where they must be."""
        try:
            model = stream_reference(self.pair.source).model
        except OptionError:  # such a reference is in memory as a whole or not at all
            model = self._sides.verifier.reference
        manifest = self.pair.manifest_of(self.task)
        return {probe.name: probe for probe in seeded_probes(manifest, model)}

    def _text_probe(self, name: str) -> Probe:
        return text_probe(self.engine, name, self._texts[name])


class MixedPart(Part):
    """Batches whose rows are of several tasks.

    Args:
        sides: the bundle and its reference.
        name: of the part.
        tasks: the parts of the engine's tasks, in its order.
    """

    def __init__(self, sides: BothSides, name: str, tasks: Sequence[TaskPart]) -> None:
        super().__init__(sides, name)
        self._parts = tasks

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._sides.engine

    @property
    def _asked(self) -> list[str]:
        return [part.task.name for part in self._parts]

    @functools.cached_property
    def _rows(self) -> dict[str, list[tuple[str, Example]]]:
        if not self._sides.has_text:
            return {}
        return mixed_rows(
            {p.task.name: p.examples or builtin_examples(p.task) for p in self._parts}
        )

    @functools.cached_property
    def _texts(self) -> dict[str, list[Example]]:
        return {name: [example for _, example in rows] for name, rows in self._rows.items()}

    @functools.cached_property
    def seeded(self) -> dict[str, Probe]:
        """The probes of seeded tokens, their rows of tasks in turn or one under each."""
        first = list(self._parts[0].seeded.values())
        return {probe.name: probe for probe in mixed_seeds(first, len(self._parts))}

    def _text_probe(self, name: str) -> Probe:
        return mixed_text(self.engine, name, self._rows[name])
