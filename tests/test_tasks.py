"""Tasks: what is accepted, what is refused and how, and how text is filled in."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptc.errors import TaskError
from eptc.tasks import (
    GLUE,
    Task,
    TaskChoice,
    chosen,
    fill,
    names_several,
    resolve,
    tasks_from_names,
)

PUBLISHED = tasks_from_names(["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"], GLUE)
WORDS = st.text(min_size=1, max_size=8)


@given(
    name=WORDS,
    labels=st.lists(WORDS, min_size=2, unique=True),
    aliases=st.lists(WORDS),
    length=st.none() | st.integers(1, 10**6),
)
def test_json_round_trip(
    name: str, labels: list[str], aliases: list[str], length: int | None
) -> None:
    task = Task(
        name, "classification", labels=tuple(labels), aliases=tuple(aliases), max_length=length
    )
    assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("wanted", "index"),
    [("sst2", 6), ("sentiment", 6), ("Sentiment", 6), ("6", 6), (6, 6), ("similarity", 7)],
)
def test_resolve(wanted: str | int, index: int) -> None:
    assert resolve(wanted, PUBLISHED) == index


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("sst3", "sst2"), ("8", "0 cola"), ("-1", "there is no task"), ("", "there is no task")],
)
def test_resolve_refuses(wanted: str, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        resolve(wanted, PUBLISHED)


def test_ambiguous_alias_is_refused() -> None:
    tasks = [Task(n, "generation", aliases=("x",)) for n in ("a", "b")]
    with pytest.raises(TaskError, match="alias of several tasks: a, b"):
        resolve("x", tasks)


def test_name_beats_alias() -> None:
    tasks = [Task("a", "generation", aliases=("b",)), Task("b", "generation")]
    assert resolve("b", tasks) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "kind": "classification"}, "two labels or more"),
        ({"name": "a", "kind": "sorting"}, "classification or regression"),
        ({"name": "", "kind": "generation"}, "non-empty"),
        ({"kind": "generation"}, "no 'name'"),
        ({"name": "a", "kind": "generation", "promt": "x"}, "did you mean 'prompt'"),
        ({"name": "a", "kind": "generation", "prompt": "{other}"}, "names 'other'"),
        ({"name": "a", "kind": "generation", "prompt": "{"}, "bad prompt"),
        ({"name": "a", "kind": "generation", "prompt": "{} {text}"}, "names ''"),
        ({"name": "a", "kind": "generation", "prompt": "{text.x}"}, "names 'text.x'"),
        ({"name": "a", "kind": "generation", "prompt": "{text!x}"}, "bad prompt"),
        ({"name": "a", "kind": "generation", "prompt": "{text:{w}}"}, "bad prompt"),
        ({"name": "a", "kind": "generation", "labels": "ab"}, "expected: a list"),
        ({"name": "a", "kind": "generation", "labels": [1]}, "expected: strings"),
        ({"name": "a", "kind": "generation", "labels": ["x", "x"]}, "label twice"),
        ({"name": "a", "kind": "generation", "fields": []}, "no fields"),
        ({"name": "a", "kind": "generation", "fields": ["x", "y", "z"]}, "no prompt"),
        ({"name": "a", "kind": "generation", "max_length": 0}, "max_length 0"),
        ({"name": "a", "kind": "generation", "max_length": True}, "max_length"),
        ({"name": "a", "kind": "generation", "prompt": 3}, "'prompt'"),
        ([], "an object"),
    ],
)
def test_from_json_refuses(data: Any, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        Task.from_json(data)


def test_fill_published_prompt() -> None:
    """The published prompts, hypothesis before premise, a trailing space kept."""
    example = {"premise": "p ", "hypothesis": "h", "label": "neutral"}
    assert fill(GLUE["mnli"], example) == ("mnli hypothesis: h premise: p ",)
    assert fill(GLUE["sst2"], "a film ") == ("sst2 sentence: a film ",)


def test_fill_without_prompt() -> None:
    pair = Task("p", "classification", ("a", "b"), labels=("x", "y"))
    assert fill(pair, ("one", "two")) == ("one", "two")
    assert fill(None, "plain") == ("plain",)


def test_braces_in_text_are_text() -> None:
    assert fill(GLUE["sst2"], "{sentence} {0}") == ("sst2 sentence: {sentence} {0}",)


@pytest.mark.parametrize(
    "example", [("one", "two"), {"text": "x"}, {"sentence": 3}, ("a", None), ()]
)
def test_fill_refuses(example: Any) -> None:
    with pytest.raises(TaskError, match="sentence"):
        fill(GLUE["sst2"], example)


def test_glue_targets() -> None:
    """What the released training script trains on."""
    assert GLUE["qqp"].labels == ("not_duplicate", "duplicate")
    assert GLUE["stsb"].labels[13] == "2.6"
    assert (GLUE["stsb"].labels[0], GLUE["stsb"].labels[-1]) == ("0.0", "5.0")


@pytest.mark.parametrize(
    ("choice", "ids"),
    [
        ("sst2", [6]),
        (6, [6]),
        ("all", list(range(8))),
        ("sst2,cola", [6, 0]),
        (" sentiment , 0", [6, 0]),
        (["stsb", 1], [7, 1]),
        ("mnli,rte,cola", [1, 5, 0]),
    ],
)
def test_chosen(choice: TaskChoice, ids: list[int]) -> None:
    assert chosen(choice, PUBLISHED) == ids
    assert names_several(choice) is (choice not in ("sst2", 6))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (None, "8 tasks, and none was chosen"),
        ("sst2,colla", "did you mean 'cola'"),
        ("sst2,sentiment", "'sst2' is chosen twice: as 'sst2' and as 'sentiment'"),
        ([6, "6"], "'sst2' is chosen twice"),
        ("sst2,", "tasks chosen are 'sst2,'"),
        ([], "tasks chosen are"),
    ],
)
def test_chosen_refuses(choice: TaskChoice, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        chosen(choice, PUBLISHED)


def test_the_only_task_need_not_be_chosen() -> None:
    assert chosen(None, PUBLISHED[:1]) == [0]


def test_a_task_called_all_is_no_wildcard() -> None:
    tasks = [Task("all", "generation"), Task("b", "generation")]
    with pytest.raises(TaskError, match="is a task here"):
        chosen("all", tasks)
    assert chosen("0", tasks) == [0]
