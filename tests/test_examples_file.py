"""Files of examples: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from eptc.errors import InputError
from eptc.examples_file import read_examples
from eptc.tasks import Task

ONE = Task("tone", "classification", labels=("bad", "good"))
TWO = Task("same", "classification", ("first", "second"), labels=("no", "yes"))
VALUE = Task("value", "regression")

BAD: dict[str, tuple[Task, bool, bytes, str]] = {
    "not JSON": (ONE, False, b'{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
    "a list": (ONE, False, b'["a"]\n', "line 1: it is a list, not an object"),
    "a string": (ONE, False, b'"a"\n', "line 1: it is a str, not an object"),
    "no field": (ONE, False, b'{"text": "a"}\n\n{"txt": "b"}\n', "line 3: .*without 'text'"),
    "one field of two": (TWO, False, b'{"first": "a"}\n', "line 1: .*without 'second'"),
    "a number for a text": (ONE, False, b'{"text": 3}\n', "line 1: an example is"),
    "nothing": (ONE, False, b"", "has no examples"),
    "blank lines": (ONE, False, b"\n  \n", "has no examples"),
    "not UTF-8": (ONE, False, b'{"text": "\xff"}\n', "cannot be read"),
    "no label": (ONE, True, b'{"text": "a"}\n', "line 1: the label is None"),
    "unknown label": (ONE, True, b'{"text": "a", "label": "fine"}\n', "the label is 'fine'"),
    "a label's number": (ONE, True, b'{"text": "a", "label": 1}\n', "line 1: the label is 1"),
    "a text for a number": (VALUE, True, b'{"text": "a", "label": "1"}\n', "the label is '1'"),
    "no number": (VALUE, True, b'{"text": "a", "label": NaN}\n', "the label is nan"),
    "infinite": (VALUE, True, b'{"text": "a", "label": 1e999}\n', "the label is inf"),
    "huge": (VALUE, True, b'{"text": "a", "label": 1' + b"0" * 400 + b"}\n", "the label is 1000"),
    "true for a number": (VALUE, True, b'{"text": "a", "label": true}\n', "the label is True"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused_files(tmp_path: Path, what: str) -> None:
    task, labelled, content, message = BAD[what]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_examples(path, task, labelled=labelled)
    assert raised.value.exit_code == 2
    assert str(path) in str(raised.value)
    assert raised.value.expected or "cannot be read" in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl cannot be read"):
        read_examples(tmp_path / "nothing.jsonl", ONE)


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "caf\u00e9", "label": "good", "id": 1}\n\n{"text": "b"}\n', "utf-8")
    assert read_examples(path, ONE) == [
        {"text": "caf\u00e9", "label": "good", "id": 1},
        {"text": "b"},
    ]


def test_separators_inside_a_text(tmp_path: Path) -> None:
    """U+2028 ends a line for Python, not for JSON."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two"}\r\n{"text": "b"}\n', "utf-8")
    assert read_examples(path, ONE) == [{"text": "one\u2028two"}, {"text": "b"}]
