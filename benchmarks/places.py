"""Where the suite keeps what it makes. Imported in every environment: standard library alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

__all__ = ["RESULTS", "ROOT", "Files"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Files:
    """The folder of one model.

    Args:
        root: where its parts are.
    """

    root: Path

    @property
    def base(self) -> Path:
        """The base model, as transformers saves it."""
        return self.root / "base"

    @property
    def checkpoint(self) -> Path:
        """A native EPT checkpoint on the base."""
        return self.root / "checkpoint"

    @property
    def zero(self) -> Path:
        """The same checkpoint with factors of zero: its engine is the base model's own."""
        return self.root / "zero"

    @property
    def merged(self) -> Path:
        """The task folded into the base's weights: a plain transformers model."""
        return self.root / "merged"

    def engine(self, contestant: str) -> Path:
        """Where a contestant keeps what it exported."""
        return self.root / "engines" / contestant
