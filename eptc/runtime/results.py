"""What an engine answers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from eptc.runtime.graph import NumpyArray
    from eptc.tasks import Task

__all__ = ["Classification", "Generation", "classified"]


@dataclasses.dataclass(frozen=True)
class Classification:
    """One text's class, or value for a regression.

    Args:
        label: the label; None for a regression or a model without labels.
        index: the label's position; None for a regression.
        probabilities: one per label in order, adding up to 1; None for a regression. Where the
            engine writes its labels, the largest may, in rare cases, be another's (see
            `Engine.classify`).
        value: a regression's value; None otherwise.
    """

    label: str | None = None
    index: int | None = None
    probabilities: tuple[float, ...] | None = None
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
    """One text's continuation or answer.

    Args:
        text: without special tokens, up to where a stop string begins.
        token_ids: the new tokens, the stop token or those of the stop string included, without
            prompt and padding.
        finished: whether a stop token or stop string ended it; False where max_new_tokens did.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool


def classified(logits: NumpyArray, task: Task | None) -> Classification:
    """Return what one row of a classifier's logits [labels] says."""
    if task is not None and task.kind == "regression":
        return Classification(value=float(logits[0]))
    shifted = np.exp(logits.astype(np.float32) - logits.max())
    index = int(logits.argmax())
    label = task.labels[index] if task is not None else None
    return Classification(label, index, tuple((shifted / shifted.sum()).tolist()))
