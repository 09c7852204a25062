"""The process of a `RemoteVerifier`: ``python -m eptc.parity_gate.process DESCRIPTOR``."""

from __future__ import annotations

import ctypes
import signal
import sys
from multiprocessing.connection import Connection

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve one connection; end when it is closed, or with the process that started this one."""
    # Ctrl-C reaches the whole group: the compiler decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    # Imported behind the signals: it takes seconds.
    from eptc.parity_gate.verifier import serve

    serve(connection)


if __name__ == "__main__":
    main()
