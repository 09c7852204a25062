"""Latency: contestants asked in turn, one at a time, and compared round by round."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from benchmarks import machine
from benchmarks.answers import difference
from benchmarks.cases import Case
from benchmarks.contestants import BESIDE_LOSSY, CONTESTANTS, ENGINE, EXACT, Contestant
from benchmarks.exports import export
from benchmarks.models import MODELS
from benchmarks.places import Files
from benchmarks.processes import Worker, WorkerError
from benchmarks.results import CaseResult, Timing
from benchmarks.settings import Settings
from benchmarks.statistics import order_of_rounds, paired_ratio, turn_value

__all__ = ["REFERENCE", "competitors", "run_case"]

REFERENCE = "unfolded"  # the one whose answers are right by definition
_LOAD_LIMIT = 600.0
# Thread pools spin for a moment after a call, in case there is another: not into the next turn.
_SETTLE = 0.02


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
        and (contestant.name in BESIDE_LOSSY if case.lossy else contestant.name != EXACT)
        and (not only or contestant.name in only or contestant.name == ENGINE)
    ]


def run_case(case: Case, files: Files, settings: Settings) -> CaseResult:
    """Measure a case.

    Contestants that do not fit in memory together are measured in groups, the engine in each.

    Raises:
        WorkerError: the engine itself cannot run: there is nothing to compare with.
    """
    for stale in files.root.glob(f"{case.name}.*.npy"):
        stale.unlink()
    entries = {c.name: _Entry(c) for c in competitors(case, settings.only)}
    for entry in entries.values():
        entry.reason = export(entry.contestant, case, files, settings)
    if reason := entries[ENGINE].reason:
        raise WorkerError(f"the engine cannot run: {reason}")
    others = [name for name, entry in entries.items() if name != ENGINE and not entry.reason]
    # The reference first: the others' answers are compared with its own.
    others.sort(key=lambda name: name != REFERENCE)
    size = MODELS[case.model].together
    loads = []
    for start in range(0, max(1, len(others)), size):
        group = [ENGINE, *others[start : start + size]]
        loads.append(_measure([entries[name] for name in group], case, files, settings))
    timings = tuple(_timing(entry, settings.seed) for entry in entries.values())
    idle, foreign = (_mean(values) for values in zip(*loads, strict=True))
    rounds = settings.rounds or case.rounds
    return CaseResult(
        case.name, case.model, case.mode, case.batch, case.length, case.new_tokens, rounds,
        settings.warmup, timings, idle, foreign,
    )  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _measure(
    entries: list[_Entry], case: Case, files: Files, settings: Settings
) -> tuple[float | None, float | None]:
    """Measure contestants side by side; return the idle and the foreign CPU share."""
    by_name = {entry.contestant.name: entry for entry in entries}
    workers: dict[str, Worker] = {}
    try:
        for entry in entries:
            _start(entry, workers, case, files, settings)
        for name in sorted(workers, key=lambda name: name != REFERENCE):
            _check_answer(by_name[name], workers, case, files, settings)
        return _rounds(by_name, workers, case, settings)
    finally:
        for worker in workers.values():
            worker.close()


def _start(
    entry: _Entry, workers: dict[str, Worker], case: Case, files: Files, settings: Settings
) -> None:
    name = entry.contestant.name
    log = files.root / f"{case.name}.{name}.log"
    try:
        workers[name] = Worker(name, case, files, settings.environments, settings.threads, log)
        workers[name].ask({"load": True}, _LOAD_LIMIT)
    except WorkerError as error:
        _drop(entry, workers, f"load: {error}", settings)


def _drop(entry: _Entry, workers: dict[str, Worker], reason: str, settings: Settings) -> None:
    """Take a contestant out, at once: what it left running would disturb the others."""
    entry.reason = reason
    if entry.contestant.name in workers:
        workers.pop(entry.contestant.name).close()
    settings.say(f"  {entry.contestant.label}: cannot run: {reason}")
    if entry.contestant.name == ENGINE:
        raise WorkerError(f"the engine cannot run: {reason}")


def _check_answer(
    entry: _Entry, workers: dict[str, Worker], case: Case, files: Files, settings: Settings
) -> None:
    """Compare an answer with the reference's; a contestant that is wrong is out."""
    name = entry.contestant.name
    path, right = (files.root / f"{case.name}.{who}.npy" for who in (name, REFERENCE))
    try:
        workers[name].ask({"answer": str(path)})
    except WorkerError as error:
        _drop(entry, workers, f"answer: {error}", settings)
        return
    entry.difference, wrong = difference(
        np.load(path), np.load(right) if right.is_file() else None, case,
        same_weights=entry.contestant.family != "base",
    )  # fmt: skip
    if wrong and not (case.lossy and name == ENGINE):
        _drop(entry, workers, f"answer: {wrong}", settings)


def _rounds(
    entries: Mapping[str, _Entry], workers: dict[str, Worker], case: Case, settings: Settings
) -> tuple[float | None, float | None]:
    count = settings.warmup + (settings.rounds or case.rounds)
    seed = settings.seed
    load = machine.Load([os.getpid(), *(worker.pid for worker in workers.values())])
    idle = _Idle()
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for order in order_of_rounds(list(workers), count, seed=seed):
        for name in order:
            if name not in workers:  # it failed in an earlier round
                continue
            time.sleep(_SETTLE)
            waiting = [worker.pid for other, worker in workers.items() if other != name]
            try:
                with idle.watch(waiting):
                    reply = workers[name].ask({"turn": settings.turn})
            except WorkerError as error:
                _drop(entries[name], workers, f"run: {error}", settings)
                continue
            seconds[name].append(turn_value(reply["seconds"]))
            entries[name].peak_rss = reply["peak_rss"]
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
    def watch(self, pids: Sequence[int]) -> Iterator[None]:
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
