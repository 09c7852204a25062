"""What is verified on: batches of text, seeded tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eptc.parity_gate.probes import (
    LONGEST,
    builtin_examples,
    odd_examples,
    synthetic,
    text_batches,
)
from eptc.tasks import GLUE, Task

ONE = Task("tone", "classification", labels=("bad", "good"))
TWO = Task("same", "classification", ("first", "second"), labels=("no", "yes"))
VALUE = Task("value", "regression")


@pytest.mark.parametrize("task", [ONE, TWO, GLUE["mnli"]])
def test_builtin_examples_fit_the_task(task: Task) -> None:
    examples = builtin_examples(task)
    assert len(examples) == 16
    for example in examples:
        assert tuple(example) == task.fields
        assert len(set(example.values())) == len(task.fields)


def test_text_batches_come_in_several_shapes() -> None:
    batches = dict(text_batches(builtin_examples(ONE)))
    assert [len(batch) for batch in batches.values()] == [1, 1, 2, 8, 8]
    assert batches["shortest text alone"] == [{"text": "x"}]
    assert len(batches["longest text alone"][0]["text"]) > 300
    together = batches["shortest and longest together"]
    assert together == batches["shortest text alone"] + batches["longest text alone"]


def test_few_examples_make_few_batches() -> None:
    (alone, same, twice, texts) = text_batches([{"text": "a"}])
    assert [len(batch) for _, batch in (alone, same, twice, texts)] == [1, 1, 2, 1]


@pytest.mark.parametrize("task", [ONE, TWO])
def test_odd_examples_exceed_the_limit_in_every_field(task: Task) -> None:
    long = [
        {name for name, text in example.items() if len(text.split()) > 128}
        for example in odd_examples(task, 128)
    ]
    assert set(task.fields) in long
    assert all({name} in long for name in task.fields)
    assert not any(len(e["first"]) > 2000 for e in odd_examples(TWO, None))


def probes(**changes: Any) -> Any:
    given = {"vocab_size": 50, "limit": None, "token_types": 0, "left": False, **changes}
    return synthetic(given.pop("vocab_size"), given.pop("limit"), **given)


def test_synthetic_shapes() -> None:
    assert [p.shape for p in probes()] == [(1, 1), (3, 1), (1, 2), (2, 17), (4, 33), (1, LONGEST)]
    assert all(p.synthetic for p in probes())


@pytest.mark.parametrize("limit", [1, 2, 5, 32])
def test_synthetic_stays_within_the_limit(limit: int) -> None:
    shapes = [p.shape for p in probes(limit=limit)]
    assert max(length for _, length in shapes) == limit
    assert all(p.attention_mask.sum(axis=1).min() >= 1 for p in probes(limit=limit))


def test_synthetic_has_the_ends_of_the_vocabulary() -> None:
    ids = np.concatenate([p.input_ids.ravel() for p in probes()])
    assert ids.min() == 0
    assert ids.max() == 49


def test_synthetic_has_every_type() -> None:
    assert all(p.token_type_ids is None for p in probes())
    for probe in probes(token_types=3)[3:]:
        assert probe.token_type_ids is not None
        assert set(np.unique(probe.token_type_ids)) == {0, 1, 2}


@pytest.mark.parametrize("left", [True, False])
def test_synthetic_masks(left: bool) -> None:
    """Padding stands on its side; no row is all padding; one row has holes."""
    *_, two, four, _ = probes(left=left)
    for mask in (*two.attention_mask, *four.attention_mask[:3]):
        steps = np.diff(mask) if left else -np.diff(mask)
        assert steps.min() >= 0
        assert mask[-1 if left else 0] == 1
    assert {tuple(p.attention_mask[0]) for p in probes()} == {(1,) * p.shape[1] for p in probes()}
    holes = four.attention_mask[3]
    assert holes[0] == holes[-1] == 1
    assert 0 < holes.sum() < len(holes)


def test_synthetic_answers_are_longer_than_what_is_written() -> None:
    *others, probe = probes(answers=7)
    assert all(p.answer is None for p in others)
    assert probe.answer is not None
    assert probe.answer.shape == (2, LONGEST)
    assert (probe.answer[:, 0] == 7).all()


def test_synthetic_is_the_same_each_time() -> None:
    for a, b in zip(probes(answers=0), probes(answers=0), strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.attention_mask, b.attention_mask)
