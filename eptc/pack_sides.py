"""Both sides of the comparison of a pack: its tasks, and the checkpoint of some of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from eptc.both_sides import BothSides, NotCheckedError
from eptc.errors import EptcError
from eptc.examples_file import read_task_examples
from eptc.pack_parts import FoldedPart, PackedPart
from eptc.pair import Pair
from eptc.parity_gate.probes import Example
from eptc.parity_gate.report import ParityReport
from eptc.parts import Part
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest
from eptc.runtime.pack_manifest import read_pack

__all__ = ["PackSides"]


class PackSides(BothSides):
    """A pack and its reference; arguments as for `BothSides`.

    A task that is named must have been made from the reference. Where none is, those that were
    made from another are left to a comparison with theirs.
    """

    @functools.cached_property
    def names(self) -> list[str]:
        """The tasks to compare, by the names they have in the pack."""
        manifest, asked = read_pack(self.folder), self._options.get("task")
        return list(manifest.tasks) if asked is None else [manifest.name_of(asked)]

    @functools.cached_property
    def pairs(self) -> dict[str, Pair | EptcError]:
        """Each task beside the checkpoint, or why it is not."""
        found: dict[str, Pair | EptcError] = {}
        options, several = dict(self._options), len(self.names) > 1
        data = options.pop("data", None) if several else None
        examples = {} if data is None else self._examples(Path(data))
        first: Pair | None = None
        for name in self.names:
            try:
                first = first or Pair.open(self.folder, **{**options, "task": name})
                found[name] = first.of_packed(name, examples.get(name)) if several else first
            except EptcError as error:
                found[name] = error
        return found

    @functools.cached_property
    def pair(self) -> Pair:
        """The first task that was made from the reference, beside it.

        Raises:
            EptcError: there is none; why the first was not.
        """
        errors = []
        for pair in self.pairs.values():
            if isinstance(pair, Pair):
                return pair
            errors.append(pair)
        raise errors[0]

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine of that task."""
        return self.engine_of(self.pair.packed, folded=False)

    def engine_of(self, name: str, *, folded: bool) -> Engine:
        """Return the engine of a task. Of folded ones the last stays: each has the whole model."""
        key = name, folded
        if key not in self._engines:
            for other in [other for other in self._engines if folded and other[1]]:
                self._engines.pop(other).close()
            assert self.pair.pack is not None
            engine = self.pair.pack.engine(name, folded=folded)
            self._engines[key] = engine
            self._stack.callback(engine.close)
        return self._engines[key]

    @functools.cached_property
    def _engines(self) -> dict[tuple[str, bool], Engine]:
        return {}

    @functools.cached_property
    def parts(self) -> list[Part]:
        """Each task twice: with its factors beside the base, and folded into it."""
        self.opened()
        found: list[Part] = []
        for pair in self.pairs.values():
            if isinstance(pair, Pair):
                switched = PackedPart(self, pair)
                found += [switched, FoldedPart(self, switched)]
        return found

    @functools.cached_property
    def scores(self) -> dict[str, dict[str, Any]] | None:
        """How both sides answer the labelled examples, by task."""
        found = {}
        for name, pair in self.pairs.items():
            if isinstance(pair, Pair) and pair.labelled is not None:
                if (scores := pair.scores(self.folder, self.verifier)) is None:
                    return None
                found[name] = scores[pair.task.name]
        return found

    def manifest(self) -> Manifest:
        """Return what the pack says of itself, as one engine would that served its tasks."""
        pack = read_pack(self.folder)
        entries = {name: pack.tasks[name] for name in self.names}
        one = pack.engine(self._first_name())
        tasks = tuple(dataclasses.replace(e.task, name=name) for name, e in entries.items())
        passes = [
            {**record, "name": f"{record['name']}, {name}"}
            for name, entry in entries.items()
            for record in entry.passes
        ]
        folded = pack.engine(self._first_name(), folded=True).graphs
        return dataclasses.replace(
            one,
            task=None,
            tasks=tasks,
            graphs={**one.graphs, **{f"{role}, folded": spec for role, spec in folded.items()}},
            passes=(*passes, *pack.passes),
            files={**pack.files, **{entry.file: entry.record for entry in pack.tasks.values()}},
        )

    def report(self) -> ParityReport | None:
        """Return what the probes that were run came to, for each part."""
        try:
            found = {part.name: part.report() for part in self.parts}
        except NotCheckedError:
            return None
        ran = {name: report for name, report in found.items() if report is not None}
        empty = ParityReport((), self.bound, {}, 0.0, (), (), 0, mixes=False)
        return empty.of_tasks(ran, None) if ran else None

    def _first_name(self) -> str:
        """Return the first task that is compared, or may have been."""
        return next((n for n, p in self.pairs.items() if isinstance(p, Pair)), self.names[0])

    def _examples(self, data: Path) -> dict[str, list[Example]]:
        """Return labelled rows by the name of their task in the pack."""
        tasks = read_pack(self.folder).tasks
        named = [dataclasses.replace(entry.task, name=name) for name, entry in tasks.items()]
        return read_task_examples(data, named, labelled=True)
