"""What parity compared, on what, with which bounds, and how far off the worst element was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eptc.parity_gate.compare import Bound, Comparison
from eptc.parity_gate.outputs import Decision

__all__ = ["AsPublished", "ParityReport", "furthest"]


@dataclasses.dataclass(frozen=True)
class AsPublished:
    """Parts of an engine that round activations, run with the nodes that are published.

    Args:
        bound: of each.
        tensors: every comparison.
    """

    bound: Bound
    tensors: tuple[Comparison, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        if not self.tensors:
            return {"tensors": 0}
        worst = furthest(self.tensors)
        return {
            "tensors": len(self.tensors),
            "largest_error": _digits(worst.error),
            "its_bound": _digits(worst.bound),
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "bound": dataclasses.asdict(self.bound),
            "tensors": [_entry(comparison) for comparison in self.tensors],
        }


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The outcome of all gates.

    Args:
        probes: name, shape, whether synthetic and how many rows were left out, of each batch.
        bound: of the output gate.
        layers: largest deviation by stage, as a fraction of its bound.
        weights: largest deviation of a written weight, as a fraction of its bound.
        tensors: every comparison of outputs.
        decisions: every choice that was compared.
        tokenized: how many texts were tokenized by both sides and were equal.
        scores: metric of engine and reference on labelled data, where there was some.
        reference: what the engine was compared with.
        mode: `whole model`, or `block by block` where each block was given the reference's state.
        published: block by block, of an engine that rounds activations, its blocks as they are
            published; in `tensors` they compute with activations in float32.
        constant_gates: whether the reference's gates were replaced by the engine's own constants.
        tasks: of an engine of several tasks, the report of each, by name; what they compared is
            in `tensors` and `decisions` as well.
        mixed: likewise, of batches whose rows are of several tasks.
        mixes: whether there are such batches; not where each task has an engine of its own.
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
    published: AsPublished | None = None
    constant_gates: bool = False
    tasks: Mapping[str, ParityReport] = dataclasses.field(default_factory=dict)
    mixed: ParityReport | None = None
    mixes: bool = True

    def of_tasks(
        self, tasks: Mapping[str, ParityReport], mixed: ParityReport | None
    ) -> ParityReport:
        """Return a report of what was compared for each task, and with rows of several.

        Args:
            tasks: by name.
            mixed: None where it did not come to that.
        """
        parts = [*tasks.values(), *([] if mixed is None else [mixed])]
        return dataclasses.replace(
            self,
            probes=tuple(probe for part in parts for probe in part.probes),
            tensors=tuple(tensor for part in parts for tensor in part.tensors),
            decisions=tuple(decision for part in parts for decision in part.decisions),
            tokenized=sum(part.tokenized for part in parts),
            tasks=dict(tasks),
            mixed=mixed,
        )

    def extended(
        self,
        outcomes: Sequence[Comparison | Decision],
        published: Sequence[Comparison] = (),
    ) -> ParityReport:
        """Return a report with more outcomes; those of published blocks apart."""
        rounded = self.published
        if rounded is not None:
            rounded = dataclasses.replace(rounded, tensors=(*rounded.tensors, *published))
        return dataclasses.replace(
            self,
            tensors=(*self.tensors, *(o for o in outcomes if isinstance(o, Comparison))),
            decisions=(*self.decisions, *(o for o in outcomes if isinstance(o, Decision))),
            published=rounded,
        )

    @property
    def worst(self) -> Comparison:
        """The comparison that came nearest to its bound, or went furthest past it."""
        return furthest(self.tensors)

    @property
    def judged(self) -> tuple[Bound, tuple[Comparison, ...]]:
        """The comparisons that say whether it has passed, and their bound.

        Those of published blocks where one of them failed: it ran because the others had passed.
        """
        rounded = self.published
        if rounded is not None and not all(c.passed for c in rounded.tensors):
            return rounded.bound, rounded.tensors
        return self.bound, self.tensors

    @property
    def left_out(self) -> int:
        """Rows of outputs, over all tensors, that were not compared (`Comparison.left_out`)."""
        return sum(c.left_out for c in self.tensors)

    @property
    def rows(self) -> int:
        """Rows of outputs over all tensors, those that were left out among them."""
        return sum(c.shape[0] for c in self.tensors if c.shape)

    @property
    def unproven(self) -> str | None:
        """Why too little was compared to speak of the model; None where it was enough.

        A minority of rows could all be of a kind: the shortest, say, which pass the fewest
        routers. And where there is text, rows of seeded tokens alone say nothing about it.
        """
        if 2 * self.left_out > self.rows:
            return f"{self.left_out} of {self.rows} rows of outputs were left out"
        texts = [probe for probe in self.probes if not probe["synthetic"]]
        if texts and all(probe["rows_left_out"] >= probe["shape"][0] for probe in texts):
            return "every row of text was left out"
        return None

    @property
    def agrees(self) -> bool:
        """Whether every tensor is within its bound and no sure decision flipped, so far.

        A report without a single tensor compared nothing, and does not agree.
        """
        agree = bool(self.tensors) and all(c.passed for c in self.tensors)
        if self.published is not None:
            # A part that rounds and was never run so has proven nothing.
            agree = agree and bool(self.published.tensors)
            agree = agree and all(c.passed for c in self.published.tensors)
        return agree and not any(d.flipped for d in self.decisions)

    @property
    def passed(self) -> bool:
        """Whether all that was compared agrees, and that was enough."""
        if self.tasks and self.mixes and self.mixed is None:
            return False
        parts = [*self.tasks.values(), *([] if self.mixed is None else [self.mixed])]
        return self.agrees and self.unproven is None and all(part.passed for part in parts)

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        published = {} if self.published is None else {"as_published": self.published.summary()}
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
            "rows": self.rows,
            "rows_left_out": self.left_out,
            "synthetic_probes": sum(bool(probe["synthetic"]) for probe in self.probes),
            "text_probes": sum(not probe["synthetic"] for probe in self.probes),
            **published,
            **({"constant_gates": True} if self.constant_gates else {}),
            **self._parts(lambda part: _short(part.summary())),
        }

    def _parts(self, said: Callable[[ParityReport], dict[str, Any]]) -> dict[str, Any]:
        if not self.tasks:
            return {}
        return {
            "tasks": {name: said(part) for name, part in self.tasks.items()},
            "mixed": None if self.mixed is None else said(self.mixed),
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; errors to two digits, the rest is noise."""
        if self.tasks:
            return {
                "summary": self.summary(),
                "bound": dataclasses.asdict(self.bound),
                "layers": {stage: _digits(error) for stage, error in self.layers.items()},
                "weights": _digits(self.weights),
                **self._parts(ParityReport.to_json),
                "scores": self.scores,
            }
        return {
            "summary": self.summary(),
            "bound": dataclasses.asdict(self.bound),
            "probes": [dict(probe) for probe in self.probes],
            "texts_tokenized_equally": self.tokenized,
            "layers": {stage: _digits(error) for stage, error in self.layers.items()},
            "weights": _digits(self.weights),
            "tensors": [_entry(comparison) for comparison in self.tensors],
            **({} if self.published is None else {"as_published": self.published.to_json()}),
            "undecided": [
                dataclasses.asdict(d) | {"margin": _digits(d.margin), "noise": _digits(d.noise)}
                for d in self.decisions
                if not d.agrees
            ],
            "scores": self.scores,
        }


# What a summary says of one of several tasks.
_SHOWN = (
    "passed", "tensors", "largest_error", "its_bound", "decisions", "flips", "ties", "rows",
    "synthetic_probes", "text_probes",
)  # fmt: skip


def _short(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in _SHOWN}


def furthest(tensors: Sequence[Comparison]) -> Comparison:
    """Return the comparison that came nearest to its bound, or went furthest past it."""
    return max(tensors, key=lambda c: (c.error / c.bound) if c.bound else c.error)


def _entry(comparison: Comparison) -> dict[str, Any]:
    return {
        "what": comparison.what,
        "shape": list(comparison.shape),
        "error": _digits(comparison.error),
        "bound": _digits(comparison.bound),
        "rows_left_out": comparison.left_out,
        "worst": list(comparison.worst),
        "cosine": _digits(comparison.cosine, 6),
        "passed": comparison.passed,
        **({"why": comparison.why} if comparison.why else {}),
    }


def _digits(value: float, digits: int = 2) -> float | str:
    rounded = float(f"{value:.{digits}g}")
    return rounded if rounded - rounded == 0 else str(rounded)
