"""How a run measures."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable

from benchmarks.processes import Environments

__all__ = ["Settings"]


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
        run: another text in each run.
    """

    environments: Environments
    threads: int
    seed: int = 0
    turn: float = 0.25
    warmup: int = 3
    rounds: int | None = None
    only: tuple[str, ...] = ()
    say: Callable[[str], None] = print
    run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
