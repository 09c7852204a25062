"""The decision gate on labelled data: a lossy engine beside the exact one, row by row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eptc.errors import ParityError
from eptc.parity_gate.probes import Example
from eptc.parity_gate.scores import score
from eptc.runtime import Engine
from eptc.tasks import Task

__all__ = [
    "CLAIMED", "Answers", "Budget", "answers", "compare_answers", "distance", "from_logs",
    "right_answers", "sure",
]  # fmt: skip

Float64 = npt.NDArray[np.float64]

# Rows from which on a drop is a claim about the task, not about these rows.
CLAIMED = 1000
# Log probabilities below this are taken for it: no engine tells them apart.
_SMALLEST = math.log(1e-30)
# What rounding alone moves scores by over a whole model, relative to the largest of a row: of sums
# in float32, and of weights that are stored in 16 bits (a step or two of that type).
_ROUNDING = {"fp16-weights": 2e-3, "bf16-weights": 1.6e-2}
_FLOAT32 = 2e-5
_RESAMPLES = 1000
# What a number read from decimals may be off by.
_TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class Answers:
    """What an engine, or the reference, answers to labelled examples.

    Args:
        chosen: a label's index, or a regression's value, for each row.
        scores: log probabilities of the labels, their mean taken off [rows, labels]; the values
            of a regression [rows, 1].
        undecided: rows in which a choice of experts was within rounding of another.
    """

    chosen: Sequence[Any]
    scores: Float64
    undecided: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a lossy engine may cost on labelled data.

    Args:
        max_drop: points (hundredths) of the task's metric; None: any.
        max_flips: share of the rows on which the reference is sure and the engine's label is
            another; None: any.
    """

    max_drop: float | None = None
    max_flips: float | None = 0.01

    def exceeded(self, scores: Mapping[str, Any]) -> str | None:
        """Return what of a comparison is over the budget; None where nothing is."""
        drop, flips = scores["drop"] * 100, scores["flips_beyond_noise"]
        if self.max_drop is not None and drop > self.max_drop + _TINY:
            return (
                f"the {scores['metric']} drops by {drop:.2f} points over {scores['rows']} rows, "
                f"allowed are {self.max_drop:g}"
            )
        if self.max_flips is not None and flips > self.max_flips * scores["rows"] + _TINY:
            return (
                f"{flips} of {scores['rows']} labels change where the reference is sure, allowed "
                f"are {self.max_flips:.2%}"
            )
        return None

    def check(self, scores: Mapping[str, Any], precision: str) -> None:
        """Raise ParityError where a comparison is over the budget."""
        if reason := self.exceeded(scores):
            raise ParityError(
                f"{precision}: {reason}",
                fix="choose a precision that loses less, --precision auto with the same budget, "
                "or a larger budget (--max-drop, --max-flips)",
            )


def answers(engine: Engine, examples: Sequence[Example]) -> Answers:
    """Ask an engine about examples of its task, cut as in training where they are too long.

    Where the rows of a batch change one another's answers each example is asked alone; an engine
    whose routers are to be frozen says that they are, and may be one of these.
    """
    size = 1 if engine.manifest.routing.mode in ("batch", "frozen") else 32
    found = engine.classify(list(examples), truncate=True, batch_size=size)
    task = engine.task
    if task is not None and task.kind == "regression":
        values = np.array([answer.value for answer in found], np.float64)
        return Answers(values.tolist(), values[:, None])
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([answer.probabilities for answer in found], np.float64))
    return from_logs([answer.index for answer in found], logs)


def from_logs(chosen: Sequence[Any], logs: Float64) -> Answers:
    """Return answers to a task with labels.

    Args:
        chosen: a label's index for each row.
        logs: log probabilities of the labels [rows, labels].
    """
    logs = np.maximum(logs, _SMALLEST)
    return Answers(chosen, logs - logs.mean(axis=1, keepdims=True))


def right_answers(task: Task, examples: Sequence[Example]) -> list[Any]:
    """Return the labels that examples have: indices, or values of a regression."""
    if task.kind == "regression":
        return [float(example["label"]) for example in examples]
    return [task.labels.index(example["label"]) for example in examples]


def sure(want: Answers, error: float, precision: str) -> npt.NDArray[np.bool_]:
    """Return on which rows the reference is sure of its label [rows].

    It is where it leads by more than twice the error of the scores; and wherever it leads by half
    of what is usual for it, however large the error is: an engine that is wrong everywhere makes
    no row unsure. Nowhere is it by what rounding may move, nor where a choice of experts was
    within rounding of another.

    Args:
        want: the reference's answers to a task with labels.
        error: of the engine's scores: root mean square over all rows and labels.
        precision: the engine's.
    """
    decided = np.array([row not in want.undecided for row in range(len(want.scores))], bool)
    if want.scores.shape[1] < 2:
        return decided
    best = np.sort(want.scores, axis=1)[:, ::-1]
    margin = best[:, 0] - best[:, 1]
    rounding = _ROUNDING.get(precision, _FLOAT32) * np.maximum(1, np.abs(best).max(axis=1))
    found: npt.NDArray[np.bool_] = margin > np.maximum(
        rounding, min(2 * error, float(np.median(margin)) / 2)
    )
    found &= decided
    return found


def compare_answers(
    task: Task, want: Answers, got: Answers, labels: Sequence[Any], *, precision: str = "fp32"
) -> dict[str, Any]:
    """Compare an engine's answers with the reference's, paired by row.

    Args:
        task: the task.
        want: the reference's answers: the exact engine's, or the PyTorch model's.
        got: the engine's.
        labels: the right ones.
        precision: the engine's, as its manifest names it; see `sure`.

    Returns:
        JSON values: `rows`, `metric`, `engine`, `reference`, `drop` (of the metric, positive
        where the engine is worse) with its paired 95 % bootstrap interval `drop_interval`,
        `claimed` (whether there are rows enough to speak of the task), `flips`,
        `flips_beyond_noise`, `error` (root mean square of the scores) and `cosine`.
    """
    metric, ours = score(task, got.chosen, labels)
    _, theirs = score(task, want.chosen, labels)
    error = float(np.sqrt(np.mean((got.scores - want.scores) ** 2)))
    flips = counted = np.zeros(len(labels), bool)
    if task.kind != "regression":
        flips = np.array(got.chosen) != np.array(want.chosen)
        counted = flips & sure(want, error, precision)
    return {
        "rows": len(labels),
        "metric": metric,
        "engine": round(ours, 4),
        "reference": round(theirs, 4),
        "drop": round(theirs - ours, 6),
        "drop_interval": _interval(task, want, got, labels),
        "claimed": len(labels) >= CLAIMED,
        "flips": int(flips.sum()),
        "flips_beyond_noise": int(counted.sum()),
        "error": float(f"{error:.2g}"),
        "cosine": float(f"{_cosine(want.scores, got.scores):.6f}"),
    }


def distance(task: Task, want: Answers, got: Answers) -> dict[str, Any]:
    """Return how far an engine's answers are from another's, whatever the right ones are.

    Args:
        task: the task.
        want: the answers of the one that counts.
        got: the engine's.

    Returns:
        JSON values: `flips` (answers that are others; None of a regression, where nearly all are),
        `error` (root mean square of the scores) and `cosine`.
    """
    changed = sum(a != b for a, b in zip(want.chosen, got.chosen, strict=True))
    error = float(np.sqrt(np.mean((got.scores - want.scores) ** 2)))
    return {
        "flips": None if task.kind == "regression" else changed,
        "error": float(f"{error:.2g}"),
        "cosine": float(f"{_cosine(want.scores, got.scores):.6f}"),
    }


def _interval(task: Task, want: Answers, got: Answers, labels: Sequence[Any]) -> list[float]:
    """Return the 2.5th and 97.5th percentile of the drop over resampled rows."""
    random = np.random.default_rng(0)
    ours, theirs, right = np.array(got.chosen), np.array(want.chosen), np.array(labels)
    if (ours == theirs).all():
        return [0.0, 0.0]
    drops = []
    for _ in range(_RESAMPLES):
        rows = random.integers(0, len(right), len(right))
        a, b, c = (array[rows].tolist() for array in (theirs, ours, right))
        drops.append(score(task, a, c)[1] - score(task, b, c)[1])
    return [round(float(q), 4) for q in np.quantile(drops, (0.025, 0.975))]


def _cosine(a: Float64, b: Float64) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum() / norms) if norms > 0 else 1.0
