"""What `eptc verify` and `eptc parity` check, each check by itself and named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eptc.both_sides import BothSides, Limits, NotCheckedError
from eptc.errors import BundleError, EptcError, ParityError
from eptc.interop.optimum import added_graphs, compare_first_step
from eptc.parity_gate.batches import check_texts
from eptc.parity_gate.compare import Comparison
from eptc.parity_gate.gate import (
    refuse,
    refuse_decisions,
    refuse_tensors,
    refuse_unproven,
)
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.outputs import Decision
from eptc.parity_gate.report import furthest
from eptc.parity_gate.several import check_refused
from eptc.parity_gate.task_weights import check_task_weights
from eptc.parity_gate.weights import check_weights
from eptc.parts import Part, TaskPart
from eptc.tasks import resolve

__all__ = ["Check", "Checks", "Found", "Limits", "NotCheckedError", "rounded"]

_AGAIN = "copy the bundle again, or build it again with `eptc export`"
_REBUILD = "build the bundle again; if it fails again, report it"
_NO_TOKENIZER = "neither the checkpoint nor its base has a tokenizer"

Found = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: what is checked.
        of: which one where there are several; empty where there is one.
        run: returns what was found, JSON values by name. Raises EptcError where the check fails,
            NotCheckedError where it cannot be made.
        part: name of what of the engine it is about; empty for the whole.
    """

    name: str
    of: str
    run: Callable[[], Found]
    part: str = ""

    @property
    def which(self) -> str:
        """Which one of its name it is, in words; empty where there is one."""
        return ": ".join(filter(None, (self.part, self.of)))


class Checks:
    """The checks of one bundle; what several of them need is loaded once, when one needs it.

    Which there are follows from the bundle, the checkpoint and the data, never from the machine:
    several processes may share them out.

    Args:
        bundle: the bundle's folder.
        limits: what is allowed instead of what the bundle says.
        options: the reference and how to read it, as for `eptc.parity`.
    """

    def __init__(
        self, bundle: str | Path, *, limits: Limits | None = None, **options: Any
    ) -> None:
        self.sides = BothSides(Path(bundle), limits or Limits(), options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sides.close()

    def __iter__(self) -> Iterator[Check]:
        """Yield the checks, cheap ones first."""
        yield Check("manifest", "", self._manifest)
        try:
            manifest = self.sides.manifest()
        except BundleError:
            return  # there is nothing to say more about
        for name, record in manifest.files.items():
            yield Check("files", name, functools.partial(self._file, name, record.size))
        for role in manifest.graphs:
            yield Check("graphs", role, functools.partial(self._graph, role))
        yield from self._origins()
        try:
            parts = self.sides.parts
        except NotCheckedError as error:
            for name in ("interface", "weights", "tokenizer", "coverage", "blocks", "scores"):
                yield Check(name, "", functools.partial(_failed, error))
            return
        tasks = [part for part in parts if isinstance(part, TaskPart)]
        for part in tasks:
            yield Check("interface", "", functools.partial(self._interface, part), part.name)
        yield from self._of_weights(tasks)
        for part in tasks:
            yield Check("tokenizer", "", functools.partial(self._tokenizer, part), part.name)
        for each in parts:
            yield from self._of_probes(each)
        if added_graphs(manifest):
            yield Check("first step", "", self._first_step)
        yield Check("coverage", "", self._coverage)
        yield Check("blocks", "", self._blocks)
        for part in tasks:
            yield Check("scores", "", functools.partial(self._scores, part), part.name)

    def _origins(self) -> Iterator[Check]:
        yield Check("origin", "", self._origin)

    def _of_weights(self, tasks: Sequence[TaskPart]) -> Iterator[Check]:
        if len(tasks) > 1:
            yield Check("task ids", "", self._task_ids)
        yield Check("weights", "", self._weights)

    def _of_probes(self, part: Part) -> Iterator[Check]:
        try:
            probes = part.probes
        except EptcError as error:
            yield Check("tensors", "", functools.partial(_failed, error), part.name)
            return
        for name in probes:
            for what, run in (("tensors", self._tensors), ("decisions", self._decisions)):
                yield Check(what, name, functools.partial(run, part, name), part.name)

    def _manifest(self) -> Found:
        manifest = self.sides.manifest()
        names = [task.name for task in manifest.tasks or filter(None, (manifest.task,))]
        return {
            "task": ", ".join(names) or None, "precision": manifest.precision,
            "target": manifest.target,
        }  # fmt: skip

    def _file(self, name: str, size: int) -> Found:
        if why := self.sides.verified.files[name]:
            raise BundleError(
                f"{name} {why}", expected="the file as the build wrote it", fix=_AGAIN
            )
        return {"bytes": size}

    def _graph(self, role: str) -> Found:
        verified = self.sides.verified
        if any(verified.files.values()):
            raise NotCheckedError("files are not as they were written: see files")
        if why := verified.graphs[role]:
            raise BundleError(f"the graph {role} {why}", fix=_AGAIN)
        return {}

    def _origin(self) -> Found:
        source = self.sides.pair.source
        return {"checkpoint": source.sha256, "base": source.base.sha256}

    def _interface(self, part: TaskPart) -> Found:
        with self.sides.whole() as (_, reference):
            check_manifest(part.engine.manifest, reference, part.task_id(reference))
        return {}

    def _task_ids(self) -> Found:
        """Check that graphs refuse rows of tasks that there are not."""
        with self.sides.whole() as (engine, _):
            check_refused(engine)
        return {"tasks": len(engine.tasks)}

    def _weights(self) -> Found:
        with self.sides.whole() as (engine, reference):
            files = [graph.file for graph in engine.manifest.graphs.values()]
            task_ids = [resolve(task.name, reference.tasks) for task in self.sides.pair.tasks]
            if len(task_ids) > 1:
                worst = max(check_task_weights(engine.directory, files, reference, task_ids))
            else:
                worst = check_weights(engine.directory, files, reference, *task_ids)
        return {"of_its_bound": rounded(worst)}

    def _tokenizer(self, part: TaskPart) -> Found:
        with self.sides.whole() as (engine, _):
            if engine.manifest.tokenizer is None:
                raise NotCheckedError("the bundle has no tokenizer")
            if (tokenizer := self.sides.verifier.tokenizer) is None:
                raise NotCheckedError(_NO_TOKENIZER)
            return {"texts": check_texts(part.engine, part.task, tokenizer, part.examples)}

    def _tensors(self, part: Part, name: str) -> Found:
        _, outcomes = part.outcomes(name)
        found = [c for c in outcomes if isinstance(c, Comparison)]
        refuse_tensors(found, self.sides.bound, _REBUILD)
        if all(c.shape and c.left_out >= c.shape[0] for c in found):
            raise NotCheckedError(
                "the reference's own choices of experts are within rounding of others in every row"
            )
        worst = furthest(found)
        return {"error": rounded(worst.error), "bound": rounded(worst.bound)}

    def _decisions(self, part: Part, name: str) -> Found:
        try:
            _, outcomes = part.outcomes(name)
        except EptcError as error:
            raise NotCheckedError(f"the probe does not run: see tensors of {name}") from error
        found = [d for d in outcomes if isinstance(d, Decision)]
        if not found:
            raise NotCheckedError("nothing is chosen on this probe")
        refuse_decisions(found, _REBUILD)
        return {"decisions": len(found), "ties": sum(not d.agrees for d in found)}

    def _first_step(self) -> Found:
        """Check the graph that `--layout optimum` added against the engine's own."""
        found = compare_first_step(self.sides.folder, self.sides.manifest())
        return {"error": found["largest_error"], "bound": found["its_bound"]}

    def _coverage(self) -> Found:
        """Check that enough rows were compared to speak of the model."""
        sides = self.sides
        if sides.opened().manifest.routing.mode in ("static", "constant", "frozen"):
            raise NotCheckedError("no route depends on the input: every row is compared")
        for part in sides.parts:
            for name in part.probes:
                try:
                    part.outcomes(name)
                except EptcError as error:
                    raise NotCheckedError(
                        f"a probe does not run: see tensors of {name}"
                    ) from error
        report = sides.report()
        assert report is not None  # seeded tokens are a probe of every part
        refuse_unproven(report)
        return {"rows": report.rows, "rows_left_out": report.left_out}

    def _blocks(self) -> Found:
        if not self.sides.opened().by_block:
            raise NotCheckedError("the model is compared as a whole: see weights and tensors")
        report = self.sides.verifier.prove(self.sides.comparable, {}, lambda _: None)
        self.sides.by_block = report
        refuse(report, _REBUILD)
        worst = report.worst
        return {"error": rounded(worst.error), "bound": rounded(worst.bound)}

    def _scores(self, part: TaskPart) -> Found:
        pair, limits = self.sides.pair, self.sides.limits
        if part.examples is None:
            raise NotCheckedError("no labelled data was given")
        if (every := self.sides.scores) is None:
            raise NotCheckedError(_NO_TOKENIZER)
        found = every[part.name or part.task.name]
        given = {"max_drop": limits.max_drop, "max_flips": limits.max_flips}
        budget = dataclasses.replace(
            pair.budget(part.task.name),
            **{name: value for name, value in given.items() if value is not None},
        )
        if reason := budget.exceeded(found):
            raise ParityError(reason, fix=", ".join(pair.fixes) or _REBUILD)
        return found


def _failed(error: Exception) -> Found:
    raise error


def rounded(value: float) -> float:
    """Return a deviation to two digits; the rest is noise."""
    return float(f"{value:.2g}")
