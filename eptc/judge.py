"""The verdict on what a build wrote; what does not pass is never published."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import bundle, lower
from eptc.calibration import twin
from eptc.errors import ParityError
from eptc.frozen_answers import compare_routed
from eptc.ir import AdaptedModel
from eptc.job import Clock, Job, Progress
from eptc.lossy import budget_of
from eptc.parity_gate import (
    Example,
    ParityReport,
    Verifier,
    answers,
    compare_answers,
    refuse,
    right_answers,
)
from eptc.pass_base import GraphPass
from eptc.passes.narrow_weights import NarrowWeights
from eptc.run_passes import run_graph_passes
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest

__all__ = ["Judge"]

_SIMULATED = (
    "simulated: in float32, every 16-bit value rounded to 16 bits; a CPU that computes the engine "
    "in float32 would prove nothing"
)


class Judge:
    """Compares what was written with the reference; what does not pass is never published."""

    def __init__(
        self,
        job: Job,
        model: AdaptedModel,
        verifier: Verifier | None,
        layers: Mapping[str, float],
        clock: Clock,
        progress: Progress,
    ) -> None:
        self._job = job
        self._model = model
        self._verifier = verifier
        self._layers = layers
        self._clock = clock
        self._progress = progress
        self._exact: ParityReport | None = None
        self._lossy: ParityReport | None = None
        self._scores: dict[str, Any] | None = None
        self._frozen: dict[str, Any] | None = None

    def prove_exact(self, directory: Path, manifest: Manifest) -> None:
        """Prove an engine in float32; the first step that is off is named where one is."""
        if self._verifier is None:
            return
        with self._clock.stage("parity"):
            subject = self._job, self._model, manifest, directory, self._verifier, self._layers
            try:
                report = self._verifier.prove(directory, self._layers, self._progress)
            except ParityError as error:
                step = _first_off(*subject)
                if step is None:  # nor does it pass without any: what was said is all there is
                    raise
                raise ParityError(
                    error.found, expected=error.expected, fix=_advice(self._job, step)
                ) from error
            if report.agrees:
                refuse(report, "")  # too little compared is no step's fault
            else:
                refuse(report, _advice(self._job, _first_off(*subject)))
        self._exact = report

    def prove_lossy(
        self, directory: Path, exact: Path | None, data: Sequence[Example] | None
    ) -> None:
        """Compare an engine of lower precision with the reference, and on data with the exact."""
        if self._verifier is None and data is None:
            return
        with contextlib.ExitStack() as stack, self._clock.stage("parity"):
            if self._job.scheme.simulated:
                directory = stack.enter_context(twin(directory, within=directory))
            if self._verifier is not None:
                report = self._verifier.prove(directory, self._layers, self._progress)
                refuse(
                    report,
                    f"{self._job.options.precision} loses more on this model than it may: choose "
                    "a precision that loses less, or --precision auto with a budget",
                )
                self._lossy = report
            if data is not None and exact is not None:
                self._progress("score")
                options = self._job.options
                self._scores = _scores(exact, directory, data)
                if options.precision == "auto" and options.precision_plan is None:
                    # The plan was chosen on these rows: of others they say too much good.
                    self._scores |= {"claimed": False, "chosen_on_these_rows": True}
                budget = budget_of(options, self._job.task)
                budget.check(self._scores, options.precision)
                self._scores["budget"] = dataclasses.asdict(budget)

    def score(
        self, directory: Path, exact: Path, data: Sequence[Example], what: str, fix: str
    ) -> None:
        """Compare an engine's answers to labelled data with the exact engine's.

        Args:
            directory: the engine's bundle.
            exact: that of the engine that does what the checkpoint's own code does.
            data: labelled examples.
            what: what makes the difference, for the message.
            fix: what else could be done about it.

        Raises:
            ParityError: more is lost than the budget allows.
        """
        with self._clock.stage("score"):
            self._scores = _scores(exact, directory, data)
            budget = budget_of(self._job.options, self._job.task)
            if reason := budget.exceeded(self._scores):
                raise ParityError(f"{what}: {reason}", fix=fix)
            self._scores["budget"] = dataclasses.asdict(budget)

    def compare_routed(
        self, directory: Path, routed: Path, texts: Sequence[Example], called: str
    ) -> dict[str, Any]:
        """Compare an engine's answers with those of the one that routes; return what was found.

        Args:
            directory: the bundle of the engine with constant gates.
            routed: that of the engine it was made of.
            texts: what both are asked.
            called: what the texts are, for people.
        """
        with contextlib.ExitStack() as stack, self._clock.stage("compare with the routes"):
            if self._job.scheme.simulated:
                directory = stack.enter_context(twin(directory, within=directory))
            self._frozen = compare_routed(routed, directory, texts, called)
        return self._frozen

    def signed(self, directory: Path, manifest: Manifest) -> Manifest:
        """Write down what was compared; return the manifest with its summary."""
        last = self._lossy or self._exact
        summary: dict[str, Any] = {"verified": False}
        if last is not None:
            details, summary = last.to_json(), last.summary()
            if self._lossy is not None and self._exact is not None:
                details["exact"] = self._exact.to_json()
                summary["exact"] = self._exact.summary()
            if self._scores is not None:
                details["scores"] = self._scores
            if self._frozen is not None:
                details["frozen"] = self._frozen
            if self._job.scheme.simulated:
                details["engine"] = summary["engine"] = _SIMULATED
            bundle.write_json(directory / "parity.json", details)
        elif self._scores is None and self._frozen is None:
            return manifest
        if self._scores is not None:
            summary["scores"] = self._scores
        if self._frozen is not None:
            summary["frozen"] = self._frozen
        return bundle.write_manifest(directory, dataclasses.replace(manifest, parity=summary))


def _scores(exact: Path, lossy: Path, data: Sequence[Example]) -> dict[str, Any]:
    """Return how the answers of two bundles compare on labelled examples."""
    found = []
    for folder in (exact, lossy):
        with Engine.load(folder, providers=["cpu"]) as engine:
            found.append(answers(engine, data))
            task = engine.task
    assert task is not None
    return compare_answers(task, found[0], found[1], right_answers(task, data))


def _first_off(
    job: Job,
    model: AdaptedModel,
    manifest: Manifest,
    directory: Path,
    verifier: Verifier,
    layers: Mapping[str, float],
) -> GraphPass | None:
    """Return the first pass after which the engine is off; None where it is without any.

    Every linear and every weight agreed with the reference, so the graph is wrong: it is built
    again with one graph pass more each time.
    """
    steps = job.graph_passes()
    written = {lower.WEIGHTS, *(graph.file for graph in manifest.graphs.values())}
    for count in range(len(steps)):
        graphs = job.bound(model)
        # How weights are stored is part of what the reference is compared with.
        storing = [step for step in steps[count:] if isinstance(step, NarrowWeights)]
        run_graph_passes(graphs, [*steps[:count], *storing], job.origins)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            trial = Path(folder)
            for name in manifest.files:
                if name not in written:
                    shutil.copy(directory / name, trial / name)
            lower.write(graphs, trial, in_flight=job.plan.in_flight)
            bundle.write_manifest(trial, dataclasses.replace(manifest, files={}))
            if not _passes(verifier, trial, layers):
                return steps[count - 1] if count else None
    return steps[-1]


def _passes(verifier: Verifier, directory: Path, layers: Mapping[str, float]) -> bool:
    try:
        return verifier.prove(directory, layers, lambda _: None).agrees
    except ParityError:
        return False


def _advice(job: Job, step: GraphPass | None) -> str:
    """Say which step is to blame, and whom to tell."""
    origin = None if step is None else job.origins.get(step.name)
    guilty = "the lowering" if step is None else f"the pass {step.name}"
    if origin is not None:
        guilty += f" of {origin}"
    found = f"{guilty} is the first step after which the engine is off: "
    if origin is None:
        return found + "report this bug"
    return found + f"report it to the authors of {origin}, or leave the pass out"
