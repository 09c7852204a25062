"""What `eptc verify` and `eptc parity` check, each check by itself and named."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eptc.both_sides import BothSides, Limits, NotCheckedError
from eptc.errors import BundleError, EptcError, ParityError
from eptc.one_task import check_one_task
from eptc.parity_gate.batches import check_texts
from eptc.parity_gate.compare import Comparison
from eptc.parity_gate.gate import (
    refuse,
    refuse_decisions,
    refuse_tensors,
    refuse_unproven,
    with_outcomes,
)
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.outputs import Decision
from eptc.parity_gate.report import ParityReport, furthest
from eptc.parity_gate.weights import check_weights
from eptc.runtime.manifest import read_manifest

__all__ = ["Check", "Checks", "Limits", "NotCheckedError"]

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
    """

    name: str
    of: str
    run: Callable[[], Found]


class Checks:
    """The checks of one bundle; what several of them need is loaded once, when one needs it.

    Which there are follows from the bundle, the checkpoint and the data, never from the machine:
    several processes may share them out.

    Args:
        bundle: the bundle's folder.
        limits: what is allowed instead of what the bundle says.
        options: the reference and how to read it, as for `eptc.parity`.

    Raises:
        OptionError: what the folder has serves several tasks.
    """

    def __init__(
        self, bundle: str | Path, *, limits: Limits | None = None, **options: Any
    ) -> None:
        check_one_task(Path(bundle))
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
            manifest = read_manifest(self.sides.folder)
        except BundleError:
            return  # there is nothing to say more about
        for name in manifest.files:
            yield Check("files", name, functools.partial(self._file, name))
        for role in manifest.graphs:
            yield Check("graphs", role, functools.partial(self._graph, role))
        yield Check("origin", "", self._origin)
        yield Check("interface", "", self._interface)
        yield Check("weights", "", self._weights)
        yield Check("tokenizer", "", self._tokenizer)
        yield from self._of_probes()
        yield Check("coverage", "", self._coverage)
        yield Check("blocks", "", self._blocks)
        yield Check("scores", "", self._scores)

    def _of_probes(self) -> Iterator[Check]:
        try:
            self.sides.opened()
        except NotCheckedError:
            return  # `origin` says why
        try:
            probes = self.sides.probes
        except EptcError as error:
            yield Check("tensors", "", functools.partial(_failed, error))
            return
        for name in probes:
            yield Check("tensors", name, functools.partial(self._tensors, name))
            yield Check("decisions", name, functools.partial(self._decisions, name))

    def _manifest(self) -> Found:
        manifest = read_manifest(self.sides.folder)
        task = manifest.task.name if manifest.task else None
        return {"task": task, "precision": manifest.precision, "target": manifest.target}

    def _file(self, name: str) -> Found:
        verified = self.sides.verified
        if why := verified.files[name]:
            raise BundleError(
                f"{name} {why}", expected="the file as the build wrote it", fix=_AGAIN
            )
        return {"bytes": verified.manifest.files[name].size}

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

    def _interface(self) -> Found:
        with self.sides.whole() as (engine, reference, task_id):
            check_manifest(engine.manifest, reference, task_id)
        return {}

    def _weights(self) -> Found:
        with self.sides.whole() as (engine, reference, task_id):
            files = [graph.file for graph in engine.manifest.graphs.values()]
            worst = check_weights(engine.directory, files, reference, task_id)
        return {"of_its_bound": _digits(worst)}

    def _tokenizer(self) -> Found:
        with self.sides.whole() as (engine, reference, task_id):
            if engine.manifest.tokenizer is None:
                raise NotCheckedError("the bundle has no tokenizer")
            if (tokenizer := self.sides.verifier.tokenizer) is None:
                raise NotCheckedError(_NO_TOKENIZER)
            task = reference.tasks[task_id]
            return {"texts": check_texts(engine, task, tokenizer, self.sides.pair.examples)}

    def _tensors(self, name: str) -> Found:
        _, outcomes = self.sides.outcomes(name)
        found = [c for c in outcomes if isinstance(c, Comparison)]
        refuse_tensors(found, self.sides.bound, _REBUILD)
        if all(c.shape and c.left_out >= c.shape[0] for c in found):
            raise NotCheckedError(
                "the reference's own choices of experts are within rounding of others in every row"
            )
        worst = furthest(found)
        return {"error": _digits(worst.error), "bound": _digits(worst.bound)}

    def _decisions(self, name: str) -> Found:
        try:
            _, outcomes = self.sides.outcomes(name)
        except EptcError as error:
            raise NotCheckedError(f"the probe does not run: see tensors of {name}") from error
        found = [d for d in outcomes if isinstance(d, Decision)]
        if not found:
            raise NotCheckedError("nothing is chosen on this probe")
        refuse_decisions(found, _REBUILD)
        return {"decisions": len(found), "ties": sum(not d.agrees for d in found)}

    def _coverage(self) -> Found:
        """Check that enough rows were compared to speak of the model."""
        sides = self.sides
        if sides.opened().manifest.routing.mode in ("static", "constant", "frozen"):
            raise NotCheckedError("no route depends on the input: every row is compared")
        report = ParityReport((), sides.bound, {}, 0.0, (), (), 0)
        for name in sides.probes:
            try:
                report = with_outcomes(report, *sides.outcomes(name))
            except EptcError as error:
                raise NotCheckedError(f"a probe does not run: see tensors of {name}") from error
        refuse_unproven(report)
        return {"rows": report.rows, "rows_left_out": report.left_out}

    def _blocks(self) -> Found:
        if not self.sides.opened().by_block:
            raise NotCheckedError("the model is compared as a whole: see weights and tensors")
        report = self.sides.verifier.prove(self.sides.comparable, {}, lambda _: None)
        self.sides.by_block = report
        refuse(report, _REBUILD)
        worst = report.worst
        return {"error": _digits(worst.error), "bound": _digits(worst.bound)}

    def _scores(self) -> Found:
        pair, limits = self.sides.opened(), self.sides.limits
        if pair.examples is None:
            raise NotCheckedError("no labelled data was given")
        found = pair.scores(self.sides.comparable, self.sides.verifier)
        if found is None:
            raise NotCheckedError(_NO_TOKENIZER)
        scores = found[pair.task.name]
        given = {"max_drop": limits.max_drop, "max_flips": limits.max_flips}
        budget = dataclasses.replace(
            pair.budget(pair.task.name),
            **{name: value for name, value in given.items() if value is not None},
        )
        if reason := budget.exceeded(scores):
            raise ParityError(reason, fix=", ".join(pair.fixes) or _REBUILD)
        return scores


def _failed(error: EptcError) -> Found:
    raise error


def _digits(value: float) -> float:
    return float(f"{value:.2g}")
