"""What `eptc parity` and `eptc verify` check, each check by itself and named."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eptc.errors import BundleError, EptcError, InputError, InternalError, ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.nn.frozen import frozen
from eptc.pair import Pair
from eptc.parity_gate.batches import check_texts, seeded_probes, text_probe, texts_by_probe
from eptc.parity_gate.compare import Bound, Comparison, bound_of
from eptc.parity_gate.gate import bound_on, refuse, refuse_decisions, refuse_tensors
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.outputs import Decision, check_outputs
from eptc.parity_gate.probes import Probe
from eptc.parity_gate.reference import frozen_gates, stream_reference
from eptc.parity_gate.report import furthest
from eptc.parity_gate.verifier import LocalVerifier
from eptc.parity_gate.weights import check_weights
from eptc.runtime import Engine, verify
from eptc.runtime.manifest import Manifest, read_manifest
from eptc.runtime.verify import VerifyReport
from eptc.tasks import resolve

__all__ = ["Check", "Checks", "Limits", "NotCheckedError"]

_AGAIN = "copy the bundle again, or build it again with `eptc export`"
_REBUILD = "build the bundle again; if it fails again, report it"


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
    run: Callable[[], Mapping[str, Any]]


class Checks:
    """The checks of one bundle; what several of them need is loaded once, when one needs it.

    Which there are follows from the bundle, the checkpoint's configuration and the data, never
    from the machine: several processes may share them out.

    Args:
        bundle: the bundle's folder.
        limits: what is allowed instead of what the bundle says.
        options: the reference and how to read it, as for `eptc.parity`.
    """

    def __init__(
        self, bundle: str | Path, *, limits: Limits | None = None, **options: Any
    ) -> None:
        self.folder = Path(bundle)
        self._limits = limits or Limits()
        self._options = options
        self._outcomes: dict[str, list[Comparison | Decision] | EptcError] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and the reference."""
        self._stack.close()

    def __iter__(self) -> Iterator[Check]:
        """Yield the checks, cheap ones first; weights of the reference are not read for it."""
        yield Check("manifest", "", self._manifest)
        try:
            manifest = read_manifest(self.folder)
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
        for name in self._planned():
            yield Check("tensors", name, functools.partial(self._tensors, name))
            yield Check("decisions", name, functools.partial(self._decisions, name))
        if manifest.routing.mode not in ("static", "constant", "frozen"):
            yield Check("coverage", "", self._coverage)
        yield Check("blocks", "", self._blocks)
        yield Check("scores", "", self._scores)

    # What is shared.

    @functools.cached_property
    def pair(self) -> Pair:
        """The bundle and its checkpoint, read."""
        return Pair.open(self.folder, **self._options)

    @functools.cached_property
    def _verified(self) -> VerifyReport:
        return verify(self.folder)

    @functools.cached_property
    def _verifier(self) -> LocalVerifier:
        return self._stack.enter_context(contextlib.closing(LocalVerifier(self._opened().subject)))

    @functools.cached_property
    def _comparable(self) -> Path:
        return self._stack.enter_context(self.pair.comparable())

    @functools.cached_property
    def _engine(self) -> Engine:
        return self._stack.enter_context(Engine.load(self._comparable, providers=["cpu"]))

    @functools.cached_property
    def _batches(self) -> dict[str, Callable[[], Probe]]:
        """What makes each probe, by its name."""
        model = stream_reference(self.pair.source).model
        task = model.tasks[resolve(self.pair.task.name, model.tasks)]
        texts = texts_by_probe(task, self.pair.examples) if self._has_tokenizer else {}
        seeded = seeded_probes(self.pair.manifest, model)
        return {
            name: functools.partial(self._text_probe, name, rows) for name, rows in texts.items()
        } | {probe.name: functools.partial(_same, probe) for probe in seeded}

    def _text_probe(self, name: str, rows: Any) -> Probe:
        return text_probe(self._engine, name, rows)

    @property
    def _has_tokenizer(self) -> bool:
        return self._verifier.tokenizer is not None and self.pair.manifest.tokenizer is not None

    @property
    def bound(self) -> Bound:
        """How far outputs may be off on text."""
        bound, limits = bound_of(self.pair.manifest.precision), self._limits
        if limits.relative is not None:
            bound = dataclasses.replace(bound, relative=limits.relative, why="as configured")
        if limits.cosine is not None:
            bound = dataclasses.replace(bound, cosine=limits.cosine)
        return bound

    def _planned(self) -> list[str]:
        try:
            return list(self._batches)
        except EptcError:
            return []  # `origin` says why

    def _opened(self) -> Pair:
        try:
            return self.pair
        except EptcError as error:
            raise NotCheckedError("there is no reference to compare with: see origin") from error

    @contextlib.contextmanager
    def _compared(self) -> Iterator[tuple[Engine, ReferenceModel, int]]:
        """Yield both sides as wholes, and the task's id."""
        if self._opened().by_block:
            raise NotCheckedError("the model is compared block by block: see blocks")
        reference = self._verifier.reference
        with frozen(reference, frozen_gates(self.pair.manifest)):
            yield self._engine, reference, resolve(self.pair.task.name, reference.tasks)

    def _of_probe(self, name: str) -> list[Comparison | Decision]:
        """Return the outcomes of a probe, which runs once."""
        if name not in self._outcomes:
            with self._compared() as (engine, reference, _):
                try:
                    has_text = self._has_tokenizer and bool(
                        texts_by_probe(self.pair.task, self.pair.examples)
                    )
                    probe = self._batches[name]()
                    bound = bound_on(probe, self.bound, has_text=has_text)
                    task = self.pair.task.name
                    found = list(check_outputs(engine, reference, task, probe, bound))
                    self._outcomes[name] = found
                except (InputError, InternalError, ParityError) as error:
                    self._outcomes[name] = error
        outcomes = self._outcomes[name]
        if isinstance(outcomes, EptcError):
            raise outcomes
        return outcomes

    # The checks.

    def _manifest(self) -> Mapping[str, Any]:
        manifest = read_manifest(self.folder)
        task = manifest.task.name if manifest.task else None
        return {"task": task, "precision": manifest.precision, "target": manifest.target}

    def _file(self, name: str) -> Mapping[str, Any]:
        if why := self._verified.files[name]:
            raise BundleError(
                f"{name} {why}", expected="the file as the build wrote it", fix=_AGAIN
            )
        return {"bytes": self._verified.manifest.files[name].size}

    def _graph(self, role: str) -> Mapping[str, Any]:
        if any(self._verified.files.values()):
            raise NotCheckedError("files are not as they were written: see files")
        if why := self._verified.graphs[role]:
            raise BundleError(f"the graph {role} {why}", fix=_AGAIN)
        return {}

    def _origin(self) -> Mapping[str, Any]:
        source = self.pair.source
        return {"checkpoint": source.sha256, "base": source.base.sha256}

    def _interface(self) -> Mapping[str, Any]:
        with self._compared() as (engine, reference, task_id):
            check_manifest(engine.manifest, reference, task_id)
        return {}

    def _weights(self) -> Mapping[str, Any]:
        with self._compared() as (_, reference, task_id):
            files = [graph.file for graph in self.pair.manifest.graphs.values()]
            worst = check_weights(self._comparable, files, reference, task_id)
        return {"of its bound": _digits(worst)}

    def _tokenizer(self) -> Mapping[str, Any]:
        with self._compared() as (engine, reference, task_id):
            if engine.manifest.tokenizer is None:
                raise NotCheckedError("the bundle has no tokenizer")
            if (tokenizer := self._verifier.tokenizer) is None:
                raise NotCheckedError("neither the checkpoint nor its base has a tokenizer")
            task = reference.tasks[task_id]
            return {"texts": check_texts(engine, task, tokenizer, self.pair.examples)}

    def _tensors(self, name: str) -> Mapping[str, Any]:
        found = [c for c in self._of_probe(name) if isinstance(c, Comparison)]
        refuse_tensors(found, self.bound, _REBUILD)
        if all(c.shape and c.left_out >= c.shape[0] for c in found):
            raise NotCheckedError(
                "the reference's own choices of experts are within rounding of others in every row"
            )
        worst = furthest(found)
        return {"error": _digits(worst.error), "bound": _digits(worst.bound)}

    def _decisions(self, name: str) -> Mapping[str, Any]:
        try:
            found = [d for d in self._of_probe(name) if isinstance(d, Decision)]
        except EptcError as error:
            raise NotCheckedError(f"the probe does not run: see tensors[{name}]") from error
        if not found:
            raise NotCheckedError("nothing is chosen on this probe")
        refuse_decisions(found, _REBUILD)
        return {"decisions": len(found), "ties": sum(not d.agrees for d in found)}

    def _coverage(self) -> Mapping[str, Any]:
        """Check that enough rows were compared to speak of the model."""
        with self._compared():
            pass
        found = {name: self._of_probe(name) for name in self._batches}
        tensors = [c for each in found.values() for c in each if isinstance(c, Comparison)]
        rows = sum(c.shape[0] for c in tensors if c.shape)
        left_out = sum(c.left_out for c in tensors)
        if 2 * left_out > rows:
            raise ParityError(
                f"{left_out} of {rows} rows were left out, since the reference's own choices of "
                "experts there are within rounding of others",
                expected="at least half of the rows compared",
                fix="give other texts with the data",
            )
        return {"rows": rows, "rows left out": left_out}

    def _blocks(self) -> Mapping[str, Any]:
        if not self._opened().by_block:
            raise NotCheckedError("the model is compared as a whole: see weights and tensors")
        report = self._verifier.prove(self._comparable, {}, lambda _: None)
        refuse(report, _REBUILD)
        worst = report.worst
        return {"error": _digits(worst.error), "bound": _digits(worst.bound)}

    def _scores(self) -> Mapping[str, Any]:
        pair = self._opened()
        if pair.examples is None:
            raise NotCheckedError("no labelled data was given")
        scores = pair.scores(self._comparable, self._verifier)
        if scores is None:
            raise NotCheckedError("neither the checkpoint nor its base has a tokenizer")
        given = {
            name: value
            for name in ("max_drop", "max_flips")
            if (value := getattr(self._limits, name)) is not None
        }
        budget = dataclasses.replace(pair.budget, **given)
        if reason := budget.exceeded(scores):
            raise ParityError(reason, fix=", ".join(pair.fixes) or _REBUILD)
        return scores


def _same(probe: Probe) -> Probe:
    return probe


def _digits(value: float) -> float:
    return float(f"{value:.2g}")
