"""Builds in processes of this machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from eptc.builds.one import Order, run_order
from eptc.builds.outcome import Outcome, failed
from eptc.errors import InputError, InternalError

__all__ = ["run_local"]


def run_local(
    orders: Sequence[Order], jobs: int, progress: Callable[[Any], None]
) -> Iterator[Outcome]:
    """Yield the outcome of each build as it ends.

    Args:
        orders: the builds.
        jobs: how many at a time; above 1 each has a process of its own.
        progress: with one at a time, called with what it does.
    """
    if jobs == 1:
        for order in orders:
            progress(order.build.name)
            yield run_order(order, progress)
        return
    workers = [_Worker() for _ in range(min(jobs, len(orders)))]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(order: Order) -> Outcome:
        worker = idle.get()
        try:
            return worker.run(order)
        finally:
            idle.put(worker)

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(run, order) for order in orders]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that builds one thing after another; a new one where it dies."""

    def __init__(self) -> None:
        self._stopped = False
        self._starting = threading.Lock()
        self._start()

    def _start(self) -> None:
        # Not forked: PyTorch and ONNX Runtime have threads.
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()

    def run(self, order: Order) -> Outcome:
        """Make one build."""
        try:
            self._connection.send(order)
            found: Outcome = self._connection.recv()
            return found
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            with self._starting:
                if not self._stopped:
                    self._start()
            return failed(order.build.name, order.build.out, _died(code))

    def stop(self) -> None:
        """End the process, politely: what it was writing is removed."""
        with self._starting:
            self._stopped = True
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection) -> None:
    """Build what is asked for until nobody asks any more."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        while True:
            connection.send(run_order(connection.recv()))


def _died(code: int | None) -> Exception:
    if code == -signal.SIGKILL:
        return InputError(
            "the process that built it was killed, as the system does where memory runs out",
            fix="build fewer at a time (--jobs), or bound them with max_memory",
        )
    return InternalError(f"the process that built it ended with code {code}")
