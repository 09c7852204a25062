"""What parity compared, on what, with which bounds, and how far off the worst element was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eptc.parity_gate.compare import Bound, Comparison
from eptc.parity_gate.outputs import Decision

__all__ = ["ParityReport"]


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The outcome of all gates.

    Args:
        probes: name, shape and whether synthetic, of each batch.
        bound: of the output gate.
        layers: largest deviation by stage, as a fraction of its bound.
        weights: largest deviation of a written weight, as a fraction of its bound.
        tensors: every comparison of outputs.
        decisions: every choice that was compared.
        tokenized: how many texts were tokenized by both sides and were equal.
        scores: metric of engine and reference on labelled data, where there was some.
        reference: what the engine was compared with.
        mode: `whole model`, or `block by block` where each block was given the reference's state.
    """

    probes: tuple[Mapping[str, Any], ...]
    bound: Bound
    layers: Mapping[str, float]
    weights: float
    tensors: tuple[Comparison, ...]
    decisions: tuple[Decision, ...]
    tokenized: int
    scores: Mapping[str, Any] | None = None
    reference: str = "unfolded PyTorch model, float32"
    mode: str = "whole model"

    @property
    def worst(self) -> Comparison:
        """The comparison that came nearest to its bound, or went furthest past it."""
        return max(self.tensors, key=lambda c: (c.error / c.bound) if c.bound else c.error)

    @property
    def left_out(self) -> int:
        """Rows of outputs, over all tensors, that were not compared (`Comparison.left_out`)."""
        return sum(c.left_out for c in self.tensors)

    @property
    def passed(self) -> bool:
        """Whether every tensor is within its bound and no sure decision flipped.

        A report without a single tensor compared nothing, and has not passed.
        """
        some = any(c.compared for c in self.tensors)
        agree = some and all(c.passed for c in self.tensors)
        return agree and not any(d.flipped for d in self.decisions)

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "verified": True,
            "passed": self.passed,
            "mode": self.mode,
            "reference": self.reference,
            "tensors": len(self.tensors),
            "largest_error": _digits(self.worst.error),
            "its_bound": _digits(self.worst.bound),
            "decisions": len(self.decisions),
            "flips": sum(d.flipped for d in self.decisions),
            "ties": sum(not d.agrees and not d.flipped for d in self.decisions),
            "rows_left_out": self.left_out,
            "synthetic_probes": sum(bool(probe["synthetic"]) for probe in self.probes),
            "text_probes": sum(not probe["synthetic"] for probe in self.probes),
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; errors to two digits, the rest is noise."""
        return {
            "summary": self.summary(),
            "bound": dataclasses.asdict(self.bound),
            "probes": [dict(probe) for probe in self.probes],
            "texts_tokenized_equally": self.tokenized,
            "layers": {stage: _digits(error) for stage, error in self.layers.items()},
            "weights": _digits(self.weights),
            "tensors": [
                {
                    "what": c.what,
                    "shape": list(c.shape),
                    "error": _digits(c.error),
                    "bound": _digits(c.bound),
                    "rows_left_out": c.left_out,
                    "worst": list(c.worst),
                    "cosine": _digits(c.cosine, 6),
                    "passed": c.passed,
                }
                for c in self.tensors
            ],
            "undecided": [
                dataclasses.asdict(d) | {"margin": _digits(d.margin), "noise": _digits(d.noise)}
                for d in self.decisions
                if not d.agrees
            ],
            "scores": self.scores,
        }


def _digits(value: float, digits: int = 2) -> float | str:
    rounded = float(f"{value:.{digits}g}")
    return rounded if rounded - rounded == 0 else str(rounded)
