"""Child processes: workers that are asked in turn, and commands that are measured whole."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS
from benchmarks.places import ROOT, Files

__all__ = ["Environments", "Usage", "Worker", "WorkerError", "measured"]


class WorkerError(Exception):
    """A contestant that cannot run; the text says why."""


@dataclasses.dataclass(frozen=True)
class Environments:
    """The Python of each environment.

    Args:
        optimum: None where it was not set up.
    """

    optimum: Path | None = None

    def python(self, environment: str) -> str:
        """Return an interpreter.

        Raises:
            WorkerError: the environment is not there.
        """
        if environment == "eptc":
            return sys.executable
        if self.optimum is None or not self.optimum.is_file():
            raise WorkerError("its environment is not set up (`make bench` does)")
        return str(self.optimum)


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a child: so many threads, no hub, this checkout's packages."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }


class Worker:
    """A process with one contestant, kept for all rounds of a case.

    Args:
        contestant: its name.
        case: what it runs.
        files: the model's folder.
        environments: whose Python to use.
        threads: threads it may use.
        log: where its standard error goes.

    Raises:
        WorkerError: its environment is missing.
    """

    def __init__(
        self, contestant: str, case: Case, files: Files, environments: Environments,
        threads: int, log: Path,
    ) -> None:  # fmt: skip
        self.contestant = contestant
        python = environments.python(CONTESTANTS[contestant].environment)
        self._log = log.open("w")
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [python, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=environment(threads),
            bufsize=0,
        )
        self._send({
            "contestant": contestant, "case": dataclasses.asdict(case),
            "folder": str(files.root), "threads": threads,
        })  # fmt: skip

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], limit: float = 600.0) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            WorkerError: the contestant failed, died, or took longer than `limit` seconds.
        """
        self._send(request)
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit)
        if not ready:
            raise WorkerError(f"no answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"its process died with code {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(str(reply["error"]))
        return reply

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            code = self._process.wait()
            raise WorkerError(f"its process died with code {code}") from None

    def close(self) -> None:
        """End the process, whatever it is doing; it holds nothing that has to be saved."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a command took.

    Args:
        code: its exit code.
        seconds: wall time.
        own_rss: bytes the process itself held at most.
        tree_rss: the same of it and of every process it waited for, the largest.
        error: the end of its standard error.
    """

    code: int
    seconds: float
    own_rss: int
    tree_rss: int
    error: str


def measured(
    command: Sequence[str], *, threads: int, extra: Mapping[str, str] | None = None, log: Path
) -> Usage:
    """Run a command in a process of its own and measure it.

    A child's peak starts at what its parent held when it was started: call this from a small
    process.
    """
    with log.open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603  # commands of the suite's own tables
            command, stdout=output, stderr=output, cwd=ROOT,
            env={**environment(threads), **(extra or {})},
        )  # fmt: skip
        watch = _PeakWatch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    tree = usage.ru_maxrss * 1024  # KiB on Linux
    return Usage(process.returncode, seconds, watch.stop() or tree, tree, text[-2000:])


class _PeakWatch:
    """Reads a process's own peak again and again: it only grows, and is gone with the process."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the peak in bytes; 0 where the system does not tell."""
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("VmHWM:"):
                    self._peak = int(line.split()[1]) * 1024
