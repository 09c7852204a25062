"""How builds ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from eptc.errors import EptcError, InternalError, ParityError

__all__ = ["Outcome", "Report", "failed"]

State = Literal["built", "kept", "failed"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one build ended.

    Args:
        name: the build's, its place below the plan's folder.
        out: where it is.
        state: `built`; `kept`: it was there, whole, and of the same inputs; or `failed`.
        seconds: wall time.
        size: bytes of all its files; 0 where it failed.
        error: what was wrong.
        exit_code: as the command line would have ended.
        warnings: what a user should know although nothing failed.
    """

    name: str
    out: Path
    state: State
    seconds: float = 0.0
    size: int = 0
    error: str | None = None
    exit_code: int = 0
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "out": str(self.out)}


@dataclasses.dataclass(frozen=True)
class Report:
    """How the builds of a plan ended, in the plan's order."""

    outcomes: Sequence[Outcome]

    @property
    def exit_code(self) -> int:
        """1 where an engine failed its gate; else 70 for a bug, 2 for bad input, 0 for neither."""
        codes = {outcome.exit_code for outcome in self.outcomes}
        order = (ParityError.exit_code, InternalError.exit_code, *sorted(codes - {0}), 0)
        return next((code for code in order if code in codes), 0)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        states = [outcome.state for outcome in self.outcomes]
        return {
            "builds": [outcome.to_json() for outcome in self.outcomes],
            **{state: states.count(state) for state in ("built", "kept", "failed")},
            "exit_code": self.exit_code,
        }


def failed(name: str, out: Path, error: Exception, seconds: float = 0.0) -> Outcome:
    """Return the outcome of a build that raised an error."""
    if isinstance(error, EptcError):
        message, code = str(error), error.exit_code
    elif isinstance(error, MemoryError):
        message, code = "there is not enough memory", 2
    else:
        message, code = f"{type(error).__name__}: {error}", InternalError.exit_code
    return Outcome(name, out, "failed", seconds, error=message, exit_code=code)
