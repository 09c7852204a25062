"""Builds on a Ray cluster, whose machines see the same files under the same paths."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eptc.builds.one import Order, run_order
from eptc.builds.outcome import Outcome, failed
from eptc.errors import InputError, MissingExtraError, OptionError

__all__ = ["run_on_ray"]

# How often a build is started again whose process or machine died.
_RETRIES = 3


def run_on_ray(
    orders: Sequence[Order], address: str, progress: Callable[[Any], None]
) -> Iterator[Outcome]:
    """Yield the outcome of each build as it ends.

    A build takes one CPU of the cluster. Where its process dies it is built again, by whichever
    process gets the claim first; the others keep what that one published.

    Args:
        orders: the builds.
        address: the cluster's; empty: what `RAY_ADDRESS` names, one that runs on this machine, or
            a new one on this machine alone.
        progress: called with what is being done.

    Raises:
        MissingExtraError: Ray is not installed.
        OptionError: there is no cluster at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("Ray is not installed", fix="pip install 'ept-compiler[ray]'")
    address = address or os.environ.get("RAY_ADDRESS", "")
    _check_reached(address)
    import ray
    from ray.exceptions import RayError

    with _connected(address):
        progress(f"{len(orders)} builds on Ray")
        run = ray.remote(num_cpus=1, max_retries=_RETRIES)(run_order)
        waiting = {run.options(name=o.build.name).remote(o): o.build for o in orders}
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            build = waiting.pop(ready)
            try:
                yield ray.get(ready)
            except RayError as error:
                # What a build itself raises is an outcome: this is the cluster's.
                why = InputError(
                    f"Ray gave it up: {type(error).__name__}: {error}",
                    fix="see the cluster's logs; where memory ran out, set max_memory",
                )
                yield failed(build.name, build.out, why)


def _check_reached(address: str) -> None:
    """Raise OptionError where nobody listens; Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if found is None:  # `auto`, `local`, or none: Ray's to find
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> OptionError:
    return OptionError(
        f"there is no Ray cluster at {address or 'the default address'}: {error}",
        expected="HOST:PORT as `ray start --head` printed it",
    )


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Be connected to a cluster; one that this process is connected to already stays so."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address or None, log_to_driver=False, include_dashboard=False,
            logging_level=logging.WARNING,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()
