"""Latency: contestants asked in turn, one at a time, and compared round by round."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS, ENGINE, Contestant
from benchmarks.models import MODELS
from benchmarks.places import Files
from benchmarks.processes import Environments, Worker, WorkerError
from benchmarks.results import CaseResult, Timing
from benchmarks.statistics import order_of_rounds, paired_ratio, turn_value

__all__ = ["REFERENCE", "Settings", "competitors", "run_case"]

REFERENCE = "unfolded"  # the one whose answers are right by definition
# Answers further off than this are wrong, whatever the order of additions.
_FAR = 0.01
_EXPORT_LIMIT = 1800.0
_LOAD_LIMIT = 600.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        environments: whose Python each contestant uses.
        threads: threads of each.
        seed: of orders and intervals.
        turn: seconds a turn lasts at least.
        warmup: rounds that are run and not counted.
        rounds: rounds that are counted; None: what the case says.
        only: names of the contestants to take; empty: all.
        say: prints progress.
    """

    environments: Environments
    threads: int
    seed: int = 0
    turn: float = 0.25
    warmup: int = 3
    rounds: int | None = None
    only: tuple[str, ...] = ()
    say: Callable[[str], None] = print


@dataclasses.dataclass
class _Entry:
    """A contestant while its case runs."""

    contestant: Contestant
    reason: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    engine: list[float] = dataclasses.field(default_factory=list)
    difference: float | None = None
    peak_rss: int | None = None


def competitors(case: Case, only: Sequence[str] = ()) -> list[Contestant]:
    """Return who takes part in a case: the engine always, the others unless left out."""
    return [
        contestant
        for contestant in CONTESTANTS.values()
        if case.mode in contestant.modes
        and (not only or contestant.name in only or contestant.name == ENGINE)
    ]


def run_case(
    case: Case, files: Files, settings: Settings
) -> tuple[CaseResult, dict[str, dict[str, str]]]:
    """Measure a case; return what was found and each environment's versions.

    Contestants that do not fit in memory together are measured in groups, the engine in each.

    Raises:
        WorkerError: the engine itself cannot run: there is nothing to compare with.
    """
    entries = {c.name: _Entry(c) for c in competitors(case, settings.only)}
    for entry in entries.values():
        _export(entry, case, files, settings)
    if reason := entries[ENGINE].reason:
        raise WorkerError(f"{case.name}: the engine cannot run: {reason}")
    versions: dict[str, dict[str, str]] = {}
    others = [name for name, entry in entries.items() if name != ENGINE and not entry.reason]
    # The reference first: the others' answers are compared with its own.
    others.sort(key=lambda name: name != REFERENCE)
    size = MODELS[case.model].together
    loads = []
    for start in range(0, max(1, len(others)), size):
        group = [ENGINE, *others[start : start + size]]
        loads.append(_measure([entries[name] for name in group], case, files, settings, versions))
    timings = tuple(_timing(entry, settings.seed) for entry in entries.values())
    idle, foreign = (_mean(values) for values in zip(*loads, strict=True))
    rounds = settings.rounds or case.rounds
    result = CaseResult(
        case.name, case.model, case.mode, case.batch, case.length, case.new_tokens, rounds,
        settings.warmup, timings, idle, foreign,
    )  # fmt: skip
    return result, versions


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _export(entry: _Entry, case: Case, files: Files, settings: Settings) -> None:
    """Let a contestant export, unless what it kept from another run is still good."""
    contestant, folder = entry.contestant, files.engine(entry.contestant.name)
    if not contestant.exports:
        return
    mark = folder.with_suffix(".json")
    try:
        key = _key(contestant, files, settings)
        kept = json.loads(mark.read_text()) if mark.is_file() else {}
        # eptc's engines are made anew in each run, by its first case.
        if kept.get("key") == (key if contestant.kept else f"{key} {id(settings)}"):
            entry.reason = kept["reason"]
            return
        settings.say(f"  {contestant.label}: exporting")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        with Worker(
            contestant.name, case, files, settings.environments, settings.threads, log
        ) as worker:
            worker.ask({"export": True}, _EXPORT_LIMIT)
    except WorkerError as error:
        entry.reason = f"export: {error}"
        settings.say(f"  {contestant.label}: cannot run: {entry.reason}")
    if not contestant.kept:
        key = f"{key} {id(settings)}"
    mark.write_text(json.dumps({"key": key, "reason": entry.reason}))


def _key(contestant: Contestant, files: Files, settings: Settings) -> str:
    """Return what a kept export depends on: the packages and the merged model."""
    python = Path(settings.environments.python(contestant.environment))
    site = sorted(
        path.name for path in python.parent.parent.glob("lib/python*/site-packages/*.dist-info")
    )
    merged = files.merged / "config.json"
    return hashlib.sha256("\n".join([*site, merged.read_text()]).encode()).hexdigest()


def _measure(
    entries: list[_Entry],
    case: Case,
    files: Files,
    settings: Settings,
    versions: dict[str, dict[str, str]],
) -> tuple[float | None, float | None]:
    """Measure contestants side by side; return the idle and the foreign CPU share."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for entry in entries:
            if (worker := _start(entry, case, files, settings, stack, versions)) is not None:
                workers[entry.contestant.name] = worker
        if ENGINE not in workers:
            engine = next(entry for entry in entries if entry.contestant.name == ENGINE)
            raise WorkerError(f"{case.name}: the engine cannot run: {engine.reason}")
        by_name = {entry.contestant.name: entry for entry in entries}
        _compare_answers(by_name, workers, case, files)
        return _rounds(by_name, workers, case, settings)


def _start(
    entry: _Entry,
    case: Case,
    files: Files,
    settings: Settings,
    stack: contextlib.ExitStack,
    versions: dict[str, dict[str, str]],
) -> Worker | None:
    contestant = entry.contestant
    log = files.root / f"{case.name}.{contestant.name}.log"
    try:
        worker = stack.enter_context(
            Worker(contestant.name, case, files, settings.environments, settings.threads, log)
        )
        reply = worker.ask({"load": True}, _LOAD_LIMIT)
    except WorkerError as error:
        entry.reason = f"load: {error}"
        settings.say(f"  {contestant.label}: cannot run: {entry.reason}")
        return None
    versions[contestant.environment] = reply["versions"]
    entry.peak_rss = reply["peak_rss"]
    return worker


def _compare_answers(
    entries: Mapping[str, _Entry], workers: dict[str, Worker], case: Case, files: Files
) -> None:
    """Compare every answer with the reference's; a contestant that is wrong is out."""
    right = files.root / f"{case.name}.{REFERENCE}.npy"
    for name in sorted(workers, key=lambda name: name != REFERENCE):
        path = files.root / f"{case.name}.{name}.npy"
        entry = entries[name]
        try:
            workers[name].ask({"answer": str(path)})
            entry.difference, wrong = _difference(
                np.load(path), np.load(right) if right.is_file() else None, case,
                same_weights=entry.contestant.family != "base",
            )  # fmt: skip
        except WorkerError as error:
            wrong = str(error)
        if wrong:
            entry.reason = f"answer: {wrong}"
            del workers[name]
    if ENGINE not in workers:
        raise WorkerError(f"{case.name}: the engine: {entries[ENGINE].reason}")


def _difference(
    answer: Any, right: Any, case: Case, *, same_weights: bool
) -> tuple[float | None, str | None]:
    """Return how far an answer is off, and what is wrong with it."""
    if case.mode == "generate" and answer.shape != (case.batch, case.new_tokens):
        return None, f"it wrote tokens of shape {answer.shape}, not {case.new_tokens} a row"
    if right is None or not same_weights:
        return None, None
    if answer.shape != right.shape:
        return None, f"it has the shape {answer.shape}, not {right.shape}"
    if case.mode == "generate":
        # Where two tokens are as likely as each other rounding may choose, and all later ones
        # differ; the work is the same.
        return float(np.mean(answer != right)), None
    off = float(np.abs(answer - right).max())
    if not off <= _FAR * float(np.abs(right).max()):
        return off, f"it is off by {off:.3g} (of {float(np.abs(right).max()):.3g})"
    return off, None


def _rounds(
    entries: Mapping[str, _Entry], workers: dict[str, Worker], case: Case, settings: Settings
) -> tuple[float | None, float | None]:
    count = settings.warmup + (settings.rounds or case.rounds)
    seed = settings.seed
    load = machine.Load(worker.pid for worker in workers.values())
    idle = _Idle()
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for order in order_of_rounds(list(workers), count, seed=seed):
        for name in order:
            if name not in workers:  # it failed in an earlier round
                continue
            waiting = [worker.pid for other, worker in workers.items() if other != name]
            try:
                with idle.watch(waiting):
                    reply = workers[name].ask({"turn": settings.turn})
            except WorkerError as error:
                entries[name].reason = f"run: {error}"
                del workers[name]
                continue
            seconds[name].append(turn_value(reply["seconds"]))
            entries[name].peak_rss = reply["peak_rss"]
    if ENGINE not in workers:
        raise WorkerError(f"{case.name}: the engine: {entries[ENGINE].reason}")
    for name in workers:
        entries[name].seconds = seconds[name][settings.warmup :]
        entries[name].engine = seconds[ENGINE][settings.warmup :]
    return idle.share(), load.foreign()


class _Idle:
    """CPU time that waiting processes use: thread pools that spin would slow down the others."""

    def __init__(self) -> None:
        self._used = self._wall = 0.0
        self._known = True

    @contextlib.contextmanager
    def watch(self, pids: Sequence[int]) -> Any:
        import time

        before, start = self._total(pids), time.monotonic()
        yield
        after = self._total(pids)
        self._wall += time.monotonic() - start
        self._used += after - before

    def _total(self, pids: Sequence[int]) -> float:
        used = [machine.cpu_seconds(pid) for pid in pids]
        self._known &= None not in used
        return sum(value or 0.0 for value in used)

    def share(self) -> float | None:
        return self._used / self._wall if self._known and self._wall else None


def _timing(entry: _Entry, seed: int) -> Timing:
    contestant = entry.contestant
    measured = not entry.reason
    ratio = None
    if measured and contestant.name != ENGINE:
        ratio = paired_ratio(entry.engine, entry.seconds, seed=seed)
    return Timing(
        contestant.name,
        contestant.label,
        contestant.family,
        "measured" if measured else "failed",
        entry.reason,
        tuple(float(f"{value:.6g}") for value in entry.seconds),
        tuple(float(f"{value:.6g}") for value in entry.engine),
        ratio,
        entry.difference,
        entry.peak_rss,
    )
