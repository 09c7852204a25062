"""A process with one contestant in it: `python -m benchmarks.worker`, asked over pipes.

One JSON object a line. In: the job first, then `{"turn": seconds}` (call again and again for
that long; out: `{"seconds": [...]}`, one for each call), `{"answer": path}` (save the answer
there as .npy) or `{"export": true}`, and the end of the file at last. Imported in every
environment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS, Call, Contestant
from benchmarks.places import Files

__all__ = ["serve"]


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""
    job = json.loads(requests.readline())
    contestant = CONTESTANTS[job["contestant"]]
    case, files = Case(**job["case"]), Files(Path(job["folder"]))
    call: Call | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if "export" in request:
                contestant.function("export")(contestant, files, case)
                reply: dict[str, Any] = {}
            elif call is None:  # the first request of any other kind loads
                call = _load(contestant, files, case, job["threads"])
                reply = {}
            else:
                reply = _run(call, request)
            # KiB on Linux.
            reply["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        except Exception as error:  # noqa: BLE001  # whatever stops a contestant is reported
            traceback.print_exc()
            reply = {"error": _said(error)}
        print(json.dumps(reply), file=replies, flush=True)


def _said(error: BaseException) -> str:
    """Return what an error says that others may be wrapped around, in a line or two."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _load(contestant: Contestant, files: Files, case: Case, threads: int) -> Call:
    call: Call = contestant.function("load")(contestant, files, case, threads)
    call()
    return call


def _run(call: Call, request: dict[str, Any]) -> dict[str, Any]:
    if "answer" in request:
        np.save(request["answer"], call())
        return {}
    seconds: list[float] = []
    while sum(seconds) < request["turn"]:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


if __name__ == "__main__":
    # Libraries print to standard output: replies go to a copy of it.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
