"""Calibration files: what is refused, and what is only said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eptc.calibration import FEW, cut_rows, read_calibration
from eptc.errors import InputError
from eptc.runtime import Engine
from eptc.tasks import Task

TONE = Task("tone", "classification", labels=("bad", "good"))
PAIR = Task("same", "classification", ("first", "second"), labels=("no", "yes"))
WRITES = Task("tone", "text-to-text", labels=("bad", "good"))
SCORE = Task("score", "regression")

REFUSED = {
    "not JSON": (TONE, '{"text": "a"}\n{"text": ', "line 2: "),
    "no field": (PAIR, '{"first": "a"}', "line 1: .*without 'second'"),
    "nothing": (TONE, "", "has no examples"),
    "unknown label": (
        TONE,
        '{"text": "a"}\n{"text": "b", "label": "fine"}',
        "line 2: the label is 'fine'",
    ),
    "one label": (TONE, '{"text": "a", "label": "bad"}\n' * 3, "every row .* has the label 'bad'"),
    "one label that is written": (
        WRITES,
        '{"text": "a", "label": "good"}\n' * 3,
        "every row .* has the label 'good'",
    ),
    "text for a number": (SCORE, '{"text": "a", "label": "1"}', "line 1: the label is '1'"),
}


@pytest.mark.parametrize(("task", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, task: Task, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        read_calibration(path, task)
    assert raised.value.expected
    assert raised.value.exit_code == 2


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_calibration(tmp_path / "data.jsonl", TONE)


def test_few_rows(tmp_path: Path) -> None:
    """Few rows are said to be few; labels may be missing, or the same number."""
    path = tmp_path / "data.jsonl"
    rows = [{"text": str(i)} for i in range(FEW)]
    rows[0]["label"] = "bad"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_calibration(path, TONE) == (rows, ())
    path.write_text("\n".join(map(json.dumps, rows[1:])))
    examples, notes = read_calibration(path, TONE)
    assert examples == rows[1:]
    assert [f"has {FEW - 1} rows" in note for note in notes] == [True]
    path.write_text('{"text": "a", "label": 1}\n' * FEW)
    assert read_calibration(path, SCORE)[1] == ()


def test_cut_rows(classifier: Path) -> None:
    with Engine.load(classifier) as engine:
        limit = engine.manifest.tokenizer and engine.manifest.tokenizer.max_length
        assert limit == 200
        # Two special tokens.
        texts = [{"text": "film " * (limit - 2)}, {"text": "film " * (limit - 1)}, {"text": "x"}]
        assert cut_rows(engine, texts) == 1
