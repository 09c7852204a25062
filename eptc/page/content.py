"""What a page says, before it is drawn: every check, every layer, every pass, every route."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc.checks import Check, Checks, NotCheckedError
from eptc.errors import EptcError, InputError, InternalError, ParityError
from eptc.inspection import route
from eptc.layer_errors import LayerError
from eptc.page.blame import blame
from eptc.pair import Pair
from eptc.parity_gate.compare import Comparison
from eptc.parity_gate.report import ParityReport
from eptc.precision_plan import FILE as PLAN
from eptc.runtime.manifest import Manifest

__all__ = ["Content", "Divergence", "Outcome", "Routes", "collect"]

# What stands beside the bundle where `--precision all` made it.
_COMPARISON = "comparison.json"
_SMALL = ("shortest and longest together", "seeded tokens 2x17")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Args:
        name: what was checked.
        of: which one of its name.
        state: `passed`, `failed` or `skipped`.
        found: what was measured.
        error: why it failed.
        why: why it was skipped.
        part: what of the engine it is about (`Check.part`).
    """

    name: str
    of: str
    state: str
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: EptcError | None = None
    why: str = ""
    part: str = ""

    @property
    def which(self) -> str:
        """Which one of its name it is, in words (`Check.which`)."""
        return ": ".join(filter(None, (self.part, self.of)))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where an engine first leaves its reference.

    Args:
        probe: the batch on which it was looked for.
        layer: the first layer that is off; None: every layer that could be compared agrees.
        step: what is known of the pass that is to blame.
    """

    probe: str
    layer: LayerError | None
    step: str


@dataclasses.dataclass(frozen=True)
class Routes:
    """What the checkpoint's tasks use of which expert.

    Args:
        tasks: their names.
        scales: size of each expert's kernel; empty where experts have none.
        experts: how many there are.
        linears: of each adapted linear, the route of each task: experts, weights, margin; None
            where it depends on the input.
    """

    tasks: Sequence[str]
    scales: Sequence[int]
    experts: int
    linears: Mapping[str, Sequence[Mapping[str, Any] | None]]


@dataclasses.dataclass(frozen=True)
class Content:
    """What a page says.

    Args:
        called: the bundle's name.
        manifest: its manifest; None where it cannot be read.
        outcomes: every check.
        parity: what the outputs came to; None where none was compared.
        layers: every layer that has a counterpart, on `probe`.
        probe: which batch that is; empty where there was none.
        divergence: None where nothing failed.
        routes: None where the checkpoint cannot be read.
        plan: what each weight is stored as, by name; None where all are float32.
        comparison: of precisions, where the bundle is one of them.
        seconds: wall time of passes, by name, as far as it is known.
    """

    called: str
    manifest: Manifest | None
    outcomes: Sequence[Outcome]
    parity: ParityReport | None
    layers: Sequence[LayerError]
    probe: str
    divergence: Divergence | None
    routes: Routes | None
    plan: Mapping[str, str] | None
    comparison: Mapping[str, Any] | None
    seconds: Mapping[str, float]

    @property
    def failed(self) -> list[Outcome]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    @property
    def passed(self) -> bool:
        """Whether no check failed, and outputs were compared."""
        return not self.failed and any(
            outcome.state == "passed" and outcome.name in ("tensors", "blocks")
            for outcome in self.outcomes
        )

    def checked(self) -> ParityReport:
        """Return what `eptc.parity` returns; raise where a check failed.

        Raises:
            InputError: as for `raise_for_failure`.
            ParityError: likewise.
        """
        self.raise_for_failure()
        assert self.parity is not None
        found = {o.part: o.found for o in self.outcomes if o.name == "scores" and o.found}
        scores = found if self.parity.tasks else found.get("")
        return dataclasses.replace(self.parity, scores=scores or None)

    @property
    def compared(self) -> list[tuple[str, Comparison]]:
        """Every comparison of outputs, and what it is called."""
        if self.parity is None:
            return []
        if not self.parity.tasks:
            return [(found.what, found) for found in self.parity.tensors]
        parts = [*self.parity.tasks.items(), ("side by side", self.parity.mixed)]
        return [
            (f"{name}: {found.what}", found)
            for name, part in parts
            if part
            for found in part.tensors
        ]

    def raise_for_failure(self) -> None:
        """Raise what stands in the way of a comparison, or ParityError where a check failed.

        Raises:
            InputError: the bundle and the checkpoint cannot be read or do not belong together.
            ParityError: a check failed; the first is told in full.
        """
        for outcome in self.failed:
            if outcome.name in ("manifest", "origin"):
                assert outcome.error is not None
                raise outcome.error
        if self.passed:
            return
        if not self.failed:
            raise ParityError("no output was compared with the reference's")
        # A weight that is off says more than the hash of its file.
        first = next((o for o in self.failed if o.name not in ("files", "graphs")), self.failed[0])
        assert first.error is not None
        raise ParityError(
            f"{len(self.failed)} of {len(self.outcomes)} checks failed; "
            f"{' '.join((first.name, first.which)).strip()}: {first.error.found}",
            expected=first.error.expected,
            fix=self.divergence.step if self.divergence is not None else first.error.fix,
        )


def collect(
    checks: Checks, *, called: str, seconds: Mapping[str, float], progress: Callable[[Any], None]
) -> Content:
    """Make every check, and gather what there is to say beside.

    Args:
        checks: of the bundle.
        called: the bundle's name.
        seconds: wall time of passes, by name.
        progress: called with what is being done.
    """
    outcomes = []
    for check in checks:
        progress(f"parity: {check.name} {check.which}".rstrip())
        outcomes.append(_outcome(check))
    sides = checks.sides
    try:
        pair: Pair | None = sides.pair
    except EptcError:
        pair = None
    try:
        manifest: Manifest | None = sides.manifest()
    except EptcError:
        manifest = None
    progress("parity: layers")
    probe, layers = _layers(checks, outcomes)
    divergence = None
    if any(outcome.state == "failed" for outcome in outcomes) and pair is not None:
        progress("parity: the first pass that is off")
        first = next((layer for layer in layers if not layer.found.passed), None)
        divergence = Divergence(probe, first, blame(pair))
    return Content(
        called,
        manifest,
        outcomes,
        sides.report(),
        layers,
        probe,
        divergence,
        None if pair is None else _routes(pair),
        (_json(sides.folder / PLAN) or {}).get("weights"),
        _json(sides.folder.absolute().parent / _COMPARISON),
        seconds,
    )


def _outcome(check: Check) -> Outcome:
    outcome = Outcome(check.name, check.of, "passed", part=check.part)
    try:
        return dataclasses.replace(outcome, found=check.run())
    except NotCheckedError as error:
        return dataclasses.replace(outcome, state="skipped", why=str(error))
    except EptcError as error:
        return dataclasses.replace(outcome, state="failed", error=error)


def _layers(checks: Checks, outcomes: Sequence[Outcome]) -> tuple[str, list[LayerError]]:
    """Return every layer's error on the first probe that failed, else on a small one."""
    tried = [o for o in outcomes if o.name == "tensors" and o.of and o.state != "skipped"]
    shown = [o for o in tried if o.state == "failed"]
    # Every layer's output is in memory at once: two rows, with padding, show what more would.
    shown += [o for wanted in _SMALL for o in tried if o.of == wanted]
    for outcome in shown:
        part = next(part for part in checks.sides.parts if part.name == outcome.part)
        try:
            if layers := part.layers(outcome.of):
                return outcome.which, layers
        except (InputError, InternalError, ParityError, NotCheckedError):
            continue  # the engine does not run on it: that is said where it failed
    return "", []


def _routes(pair: Pair) -> Routes:
    contents = pair.source.contents
    linears = {
        path: [route(adapter, task_id) for task_id in range(len(contents.tasks))]
        for path, adapter in contents.adapters.items()
    }
    most = max(
        (1 + max(found["experts"]) for each in linears.values() for found in each if found),
        default=0,
    )
    scales = tuple(contents.kernel_sizes)
    names = [task.name for task in contents.tasks]
    return Routes(names, scales, max(most, len(scales)), linears)


def _json(path: Path) -> dict[str, Any] | None:
    """Return what a file beside the graphs says; None where there is none, or another's."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
