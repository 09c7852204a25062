"""Batches whose rows are of several tasks: the reference's answers to them, and what they are."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from eptc.examples_file import Example
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.probes import Probe
from eptc.runtime import Engine

__all__ = ["MixedModel", "mixed_rows", "mixed_seeds", "mixed_text"]

# Rows of each task in batches of text.
_TEXTS = 3
_ROWS = 8


class MixedModel:
    """Answers each row of a batch as its own task's model does, one task after the other.

    A task's answers to the other rows are thrown away.

    Args:
        reference: the unfolded model.
        tasks: the name of each row's task.
        width: of the engine's logits; narrower ones are filled up with zeros. None: as wide as
            they are.
    """

    def __init__(self, reference: ReferenceModel, tasks: Sequence[str], width: int | None) -> None:
        self._reference, self._width = reference, width
        names = np.array(tasks)
        self._rows = {task: np.flatnonzero(names == task) for task in dict.fromkeys(tasks)}

    def __call__(self, **inputs: Any) -> Any:
        """Return an output that has logits, and no cache."""
        logits = self._each(lambda: self._reference.hf(**inputs).logits, self._width)
        return types.SimpleNamespace(logits=logits, past_key_values=None)

    def get_encoder(self) -> Any:
        """Return what gives the encoder's output."""

        def encode(**inputs: Any) -> Any:
            def state() -> Any:
                return self._reference.hf.get_encoder()(**inputs).last_hidden_state

            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=self._each(state))

        return encode

    def _each(self, answer: Callable[[], Any], width: int | None = None) -> Any:
        found: dict[str, torch.Tensor] = {}
        for task, rows in self._rows.items():
            with self._reference.task(task):
                found[task] = answer()[rows]
        first = next(iter(found.values()))
        count = sum(len(rows) for rows in self._rows.values())
        mixed = first.new_zeros((count, *first.shape[1:-1], width or first.shape[-1]))
        for task, rows in self._rows.items():
            mixed[rows, ..., : found[task].shape[-1]] = found[task]
        return mixed


def mixed_rows(
    examples: Mapping[str, Sequence[Example]],
) -> dict[str, list[tuple[str, Example]]]:
    """Return batches of text of several tasks, side by side: task and text of each row, by name.

    Args:
        examples: texts of each task, by its name.
    """
    rows = [
        (task, given[number % len(given)])
        for number in range(_TEXTS)
        for task, given in examples.items()
    ]
    batches = math.ceil(len(rows) / _ROWS)
    found = {}
    for number in range(batches):
        some = rows[number::batches]
        found[f"texts of {len({task for task, _ in some})} tasks, batch {number}"] = some
    return found


def mixed_text(engine: Engine, name: str, rows: Sequence[tuple[str, Example]]) -> Probe:
    """Return a batch of text of several tasks, tokenized as the engine does it.

    Args:
        engine: an engine of several tasks.
        name: of the batch.
        rows: task and text of each.
    """
    feeds = engine.tokenize(
        [example for _, example in rows], tasks=[task for task, _ in rows], truncate=True
    )
    return Probe(
        name,
        feeds["input_ids"],
        feeds["attention_mask"],
        feeds.get("token_type_ids"),
        task_ids=feeds["task_ids"],
    )


def mixed_seeds(probes: Sequence[Probe], tasks: int) -> Iterator[Probe]:
    """Yield batches of seeded tokens: one row under every task, and rows of tasks in turn.

    Args:
        probes: those of one task.
        tasks: how many there are.
    """
    rng = np.random.default_rng(0)
    for probe in probes:
        if not probe.synthetic or probe.answer is not None or probe.shape[1] < 2:
            continue
        if probe.shape[0] > 1:
            ids = (rng.integers(tasks) + np.arange(len(probe.input_ids))) % tasks
            yield dataclasses.replace(probe, name=f"{probe.name}, tasks in turn", task_ids=ids)
            continue
        types = probe.token_type_ids
        yield dataclasses.replace(
            probe,
            name=f"{probe.name} under each task",
            input_ids=np.repeat(probe.input_ids, tasks, axis=0),
            attention_mask=np.repeat(probe.attention_mask, tasks, axis=0),
            token_type_ids=None if types is None else np.repeat(types, tasks, axis=0),
            task_ids=np.arange(tasks),
        )
