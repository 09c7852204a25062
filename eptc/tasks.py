"""Tasks: what a checkpoint was trained on, how its text was prepared, what its labels are."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from eptc.errors import TaskError
from eptc.similar_names import did_you_mean

__all__ = [
    "GLUE", "Kind", "Task", "TaskChoice", "chosen", "fill", "names_several", "resolve",
    "tasks_from_names",
]  # fmt: skip

Kind = Literal["classification", "regression", "text-to-text", "generation"]
TaskChoice = str | int | Sequence[str | int] | None
"""One task by name, alias or id; several of them, or as text with commas; `all`; None: the one."""

_ALL = "all"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a checkpoint; its position in the checkpoint's list is its id.

    Args:
        name: the task's name, unique in its checkpoint.
        kind: `classification` and `regression` have a head on an encoder; `text-to-text`
            writes its answer as text; `generation` has no closed set of answers.
        fields: names of the text fields an example has, in order.
        prompt: a `str.format` template over the fields. Empty: the text itself (one field)
            or a pair of texts (two fields, encoder classifiers).
        labels: answers in the order of their ids; empty for regression and generation.
        metric: name of the metric the task is scored with; empty where unknown.
        aliases: other names the task is known by.
        max_length: tokens to which training truncated its input; None where it did not.

    Raises:
        TaskError: a field of the wrong form, or a template that names an unknown field.
    """

    name: str
    kind: Kind
    fields: tuple[str, ...] = ("text",)
    prompt: str = ""
    labels: tuple[str, ...] = ()
    metric: str = ""
    aliases: tuple[str, ...] = ()
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise TaskError(f"a task has the name {self.name!r}", expected="a non-empty string")
        if self.kind not in get_args(Kind):
            raise TaskError(
                f"task {self.name!r} has the kind {self.kind!r}",
                expected=" or ".join(get_args(Kind)),
            )
        if not self.fields:
            raise TaskError(f"task {self.name!r} has no fields", expected="at least one name")
        if len(set(self.labels)) != len(self.labels):
            raise TaskError(f"task {self.name!r} names a label twice: {list(self.labels)}")
        if self.kind == "classification" and len(self.labels) < 2:
            raise TaskError(
                f"task {self.name!r} is a classification with labels {list(self.labels)}",
                expected="two labels or more",
            )
        if self.max_length is not None and self.max_length < 1:
            raise TaskError(f"task {self.name!r} has max_length {self.max_length}")
        self._check_prompt()

    def _check_prompt(self) -> None:
        if not self.prompt:
            if len(self.fields) > 2:
                raise TaskError(
                    f"task {self.name!r} has {len(self.fields)} fields and no prompt",
                    expected="a prompt template over its fields",
                )
            return
        try:
            parsed = list(string.Formatter().parse(self.prompt))
            used = {name for _, name, _, _ in parsed if name is not None}
        except ValueError as error:
            raise TaskError(f"task {self.name!r}: bad prompt {self.prompt!r}: {error}") from error
        if unknown := sorted(used - set(self.fields)):
            raise TaskError(
                f"the prompt of task {self.name!r} names {unknown[0]!r}",
                expected=f"only its fields: {', '.join(self.fields)}",
            )
        try:
            self.prompt.format(**dict.fromkeys(self.fields, ""))
        except (LookupError, TypeError, ValueError) as error:
            raise TaskError(f"task {self.name!r}: bad prompt {self.prompt!r}: {error}") from error

    @property
    def num_outputs(self) -> int:
        """Width of the task's head on an encoder: one for regression, else one a label."""
        return 1 if self.kind == "regression" else len(self.labels)

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON values, every field in order."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """Make a task from JSON values.

        Raises:
            TaskError: an unknown key (the nearest known one is named), a missing or wrong value.
        """
        if not isinstance(data, Mapping):
            raise TaskError(f"a task is described by {data!r}", expected="an object")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise TaskError(
                    f"a task has the unknown key {key!r}{did_you_mean(key, known)}",
                    expected=", ".join(known),
                )
        if missing := [key for key in ("name", "kind") if key not in data]:
            raise TaskError(f"a task has no {missing[0]!r}: {dict(data)}")
        values = dict(data)
        for key in ("fields", "labels", "aliases"):
            if key not in values:
                continue
            value = values[key]
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TaskError(
                    f"{key!r} of task {data['name']!r} is {value!r}", expected="a list"
                )
            if not all(isinstance(item, str) for item in value):
                raise TaskError(
                    f"{key!r} of task {data['name']!r} is {value!r}", expected="strings"
                )
            values[key] = tuple(value)
        for key in ("prompt", "metric"):
            if not isinstance(values.get(key, ""), str):
                raise TaskError(f"{key!r} of task {data['name']!r} is {values[key]!r}")
        length = values.get("max_length")
        if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
            raise TaskError(f"'max_length' of task {data['name']!r} is {length!r}")
        return cls(**values)


def fill(task: Task | None, example: str | Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """Return the text (one string) or text pair (two) that the tokenizer gets for an example.

    Args:
        task: the task whose template is applied; None for plain text.
        example: a string, a pair, or a mapping from the task's field names to strings.

    Raises:
        TaskError: the example does not have the task's fields.
    """
    fields = task.fields if task is not None else ("text",)
    if isinstance(example, str):
        values: tuple[Any, ...] = (example,)
    elif isinstance(example, Mapping):
        if missing := [name for name in fields if name not in example]:
            raise TaskError(
                f"an example has the fields {sorted(map(str, example))}, without {missing[0]!r}",
                expected=", ".join(fields),
            )
        values = tuple(example[name] for name in fields)
    else:
        values = tuple(example)
    if len(values) != len(fields) or not all(isinstance(value, str) for value in values):
        raise TaskError(
            f"an example is {example!r}",
            expected=f"{len(fields)} text{'s' if len(fields) > 1 else ''}: {', '.join(fields)}",
        )
    if task is None or not task.prompt:
        return values
    return (task.prompt.format(**dict(zip(fields, values, strict=True))),)


def resolve(wanted: str | int, tasks: Sequence[Task]) -> int:
    """Return the id of the task that a name, an alias or an id names.

    Raises:
        TaskError: no such task (the nearest names are given), or an alias that two tasks claim.
    """
    text = str(wanted)
    names = [task.name for task in tasks]
    if text in names:
        return names.index(text)
    found = [i for i, task in enumerate(tasks) if text.lower() in map(str.lower, task.aliases)]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise TaskError(
            f"{text!r} is an alias of several tasks: {', '.join(names[i] for i in found)}",
            fix="use the task's name",
        )
    if text.isdecimal() and int(text) < len(tasks):
        return int(text)
    known = names + [alias for task in tasks for alias in task.aliases]
    raise TaskError(
        f"there is no task {text!r}{did_you_mean(text, known, 3)}",
        expected=", ".join(f"{i} {name}" for i, name in enumerate(names)),
    )


def names_several(choice: TaskChoice) -> bool:
    """Whether a choice is one of several tasks, however many those turn out to be."""
    if isinstance(choice, str):
        return choice == _ALL or "," in choice
    return isinstance(choice, Sequence)


def chosen(choice: TaskChoice, tasks: Sequence[Task]) -> list[int]:
    """Return the ids of the tasks that are meant, in the order they are named in.

    Args:
        choice: what the caller said.
        tasks: the checkpoint's.

    Raises:
        TaskError: no such task, one that is named twice, or none where there are several.
    """
    known = ", ".join(task.name for task in tasks)
    if choice is None:
        if len(tasks) > 1:
            raise TaskError(
                f"there are {len(tasks)} tasks, and none was chosen",
                expected=f"one of {known}, several with commas between them, or {_ALL}",
                fix="choose with --task",
            )
        return [0]
    if not names_several(choice):
        assert isinstance(choice, str | int)
        return [resolve(choice, tasks)]
    if choice == _ALL:
        if any(_ALL in (task.name, *task.aliases) for task in tasks):
            raise TaskError(
                f"{_ALL!r} is a task here, and means every task",
                fix="name the tasks, or give the id of that one",
            )
        return list(range(len(tasks)))
    assert not isinstance(choice, int)
    wanted = [w.strip() for w in choice.split(",")] if isinstance(choice, str) else list(choice)
    if not wanted or "" in wanted:
        raise TaskError(f"the tasks chosen are {choice!r}", expected=f"some of {known}, or {_ALL}")
    found: dict[int, str | int] = {}
    for word in wanted:
        task_id = resolve(word, tasks)
        if task_id in found:
            raise TaskError(
                f"task {tasks[task_id].name!r} is chosen twice: as {found[task_id]!r} and as "
                f"{word!r}",
                fix="name each task once",
            )
        found[task_id] = word
    return list(found)


def tasks_from_names(names: Sequence[str], specs: Mapping[str, Task]) -> tuple[Task, ...]:
    """Return one task per name in id order; a name without a spec only generates.

    Raises:
        TaskError: a name given twice or empty.
    """
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise TaskError(f"the task {repeated[0]!r} is listed twice: {', '.join(names)}")
    return tuple(specs.get(name, Task(name, "generation", metric="")) for name in names)


def _glue(
    name: str, prompt: str, labels: Sequence[str], metric: str, aliases: Sequence[str] = ()
) -> Task:
    fields = tuple(name for _, name, _, _ in string.Formatter().parse(prompt) if name)
    return Task(
        name, "text-to-text", fields, prompt, tuple(labels), metric, tuple(aliases), max_length=128
    )


_STSB = tuple(f"{i / 5:.1f}" for i in range(26))

# The prompts and target words of the released training script (field order is the prompt's).
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "cola sentence: {sentence}", ("unacceptable", "acceptable"), "matthews",
              ("acceptability", "grammar")),
        _glue("mnli", "mnli hypothesis: {hypothesis} premise: {premise}",
              ("entailment", "neutral", "contradiction"), "accuracy", ("nli",)),
        _glue("mrpc", "mrpc sentence1: {sentence1} sentence2: {sentence2}",
              ("not_equivalent", "equivalent"), "accuracy", ("paraphrase",)),
        _glue("qnli", "qnli question: {question} sentence: {sentence}",
              ("entailment", "not_entailment"), "accuracy", ("answerability",)),
        _glue("qqp", "qqp question1: {question1} question2: {question2}",
              ("not_duplicate", "duplicate"), "accuracy", ("duplicate-question",)),
        _glue("rte", "rte sentence1: {sentence1} sentence2: {sentence2}",
              ("entailment", "not_entailment"), "accuracy", ("entailment",)),
        _glue("sst2", "sst2 sentence: {sentence}", ("negative", "positive"), "accuracy",
              ("sentiment", "sst-2", "sst")),
        _glue("stsb", "stsb sentence1: {sentence1} sentence2: {sentence2}", _STSB, "pearson",
              ("similarity", "sts-b", "sts")),
        _glue("boolq", "boolq passage: {passage} question: {question}", ("yes", "no"), "accuracy"),
        _glue("scitail", "scitail premise: {premise} hypothesis: {hypothesis}",
              ("entailment", "neutral"), "accuracy"),
        _glue("cb", "cb premise: {premise} hypothesis: {hypothesis}",
              ("entailment", "contradiction", "neutral"), "accuracy"),
    )
}  # fmt: skip
