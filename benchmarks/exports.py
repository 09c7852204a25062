"""Letting contestants export, each in a process of its own; what depends on others is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.contestants import ENGINE, Contestant
from benchmarks.places import Files
from benchmarks.processes import Worker, WorkerError
from benchmarks.settings import Settings

__all__ = ["engine_folder", "export"]

_LIMIT = 1800.0


def export(contestant: Contestant, case: Case, files: Files, settings: Settings) -> str | None:
    """Let a contestant export, unless that is done; return why it cannot, or None.

    Other exporters' engines are kept from run to run; eptc's, and failures, from case to case.
    """
    if not contestant.exports:
        return None
    folder = engine_folder(contestant, case, files)
    mark = folder.with_name(f"{folder.name}.json")
    try:
        packages = _packages(contestant, settings)
        done = json.loads(mark.read_text()) if mark.is_file() else {}
        if done.get("key") in (settings.run, packages if contestant.kept else settings.run):
            reason: str | None = done["reason"]
        else:
            settings.say(f"  {contestant.label}: exporting")
            reason = _run(contestant, case, files, settings)
            key = packages if contestant.kept and reason is None else settings.run
            mark.write_text(json.dumps({"key": key, "reason": reason}))
    except WorkerError as error:
        reason = str(error)
    if reason is not None:
        settings.say(f"  {contestant.label}: cannot run: {reason}")
    return reason


def engine_folder(contestant: Contestant, case: Case, files: Files) -> Path:
    """Return where a contestant keeps what it exported for a case."""
    lossy = case.lossy and contestant.name == ENGINE
    return files.engine(f"{contestant.name}-{case.precision}" if lossy else contestant.name)


def _run(contestant: Contestant, case: Case, files: Files, settings: Settings) -> str | None:
    folder = engine_folder(contestant, case, files)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    try:
        with Worker(
            contestant.name, case, files, settings.environments, settings.threads, log
        ) as worker:
            worker.ask({"export": True}, _LIMIT)
    except WorkerError as error:
        return f"export: {error}"
    return None


def _packages(contestant: Contestant, settings: Settings) -> str:
    """Return a hash of the packages of a contestant's environment."""
    python = Path(settings.environments.python(contestant.environment))
    names = python.parent.parent.glob("lib/python*/site-packages/*.dist-info")
    return hashlib.sha256("\n".join(sorted(path.name for path in names)).encode()).hexdigest()
