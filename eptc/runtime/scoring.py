"""Label scoring: how likely each label is as an answer, all of them in one pass.

Every label's tokens are given to the decoder at once (teacher forcing). From the logits come

* the **probabilities**: softmax over the labels' log-likelihoods, each the sum over the label's
  tokens and its end;
* the **label**: where greedy writing arrives that may write nothing but labels. What plain greedy
  writes, if it is a label's tokens and an end, is therefore always the label chosen. Where labels
  have several tokens, another label can, in rare cases, be the likeliest as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eptc.errors import TaskError
from eptc.runtime.decoding import sound
from eptc.runtime.results import Classification

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime.decoding import Steps
    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.manifest import Manifest
    from eptc.runtime.tokenizer import TextTokenizer
    from eptc.tasks import Task

__all__ = ["Labels", "score", "task_labels"]

_Tokens = tuple[int, ...]


class Labels:
    """The labels of a task as token sequences, and the tree they make.

    Args:
        names: the labels.
        tokens: of each, without an end.
        stops: tokens that end an answer.
        scored_end: whether a label's likelihood covers its end; False where training never
            taught the model to end.

    Raises:
        TaskError: two labels have the same tokens, or one begins another and nothing ends them.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokens: Sequence[_Tokens],
        stops: Sequence[int],
        *,
        scored_end: bool,
    ) -> None:
        self.names = tuple(names)
        self._tokens = tuple(tokens)
        self._stops = sorted(set(stops))
        self._scored_end = scored_end and bool(stops)
        # The next tokens of everything that begins a label, in order of their ids.
        self._next: dict[_Tokens, list[int]] = {}
        for label in self._tokens:
            for i in range(len(label) + 1):
                self._next.setdefault(label[:i], []).extend(label[i : i + 1])
        self._next = {start: sorted(set(after)) for start, after in self._next.items()}
        self._refuse_equal()
        #: Token sequences whose logits tell everything: labels that begin no other label.
        self.paths = tuple(label for label in self._tokens if not self._next[label])
        self.longest = max(map(len, self.paths))
        # Where the logits after a beginning are found: which path, and how far along it.
        self._place = {
            path[:i]: (p, i)
            for p, path in reversed(tuple(enumerate(self.paths)))
            for i in range(len(path) + 1)
        }

    def _refuse_equal(self) -> None:
        for i, label in enumerate(self._tokens):
            if label in self._tokens[:i]:
                other = self.names[self._tokens.index(label)]
                raise TaskError(
                    f"the labels {other!r} and {self.names[i]!r} are the same tokens to the engine"
                )
            if self._next[label] and not self._stops:
                raise TaskError(
                    f"the label {self.names[i]!r} begins another, and the engine has no stop "
                    "token that would tell them apart"
                )

    def answer(self, logits: NumpyArray) -> Classification:
        """Return one text's class.

        Args:
            logits: [paths, 1 + longest path, vocabulary]: after the beginning of the answer and
                after each token of the path.
        """
        scores = sound(logits).astype(np.float64)
        largest = scores.max(axis=-1, keepdims=True)
        scores -= largest + np.log(np.exp(scores - largest).sum(axis=-1, keepdims=True))
        totals = np.array([self._total(label, scores) for label in self._tokens])
        shares = np.exp(totals - totals.max())
        index = self._tokens.index(self._walk(logits))
        return Classification(self.names[index], index, tuple((shares / shares.sum()).tolist()))

    def _total(self, label: _Tokens, scores: NumpyArray) -> float:
        """Return a label's log-likelihood; any of the stop tokens may end it."""
        total = sum(float(scores[self._place[label[:i]]][t]) for i, t in enumerate(label))
        if self._scored_end:
            total += float(np.logaddexp.reduce(scores[self._place[label]][self._stops]))
        return total

    def _walk(self, logits: NumpyArray) -> _Tokens:
        """Return the label that greedy reaches when it may write labels only."""
        start: _Tokens = ()
        while after := self._next[start]:
            ends = self._stops if start in self._tokens else []
            allowed = sorted({*after, *ends})
            # The first of the largest, as argmax over the vocabulary would take.
            token = allowed[int(logits[self._place[start]][allowed].argmax())]
            if token in ends:
                break
            start = (*start, token)
        return start


def task_labels(task: Task | None, manifest: Manifest, tokenizer: TextTokenizer) -> Labels:
    """Return the labels of a task whose engine writes them, as tokens, as training wrote them.

    Args:
        task: the task.
        manifest: the engine's.
        tokenizer: the engine's.

    Raises:
        TaskError: there are none, or `Labels` refuses them.
    """
    settings = manifest.generation
    assert settings is not None
    if task is None or not task.labels:
        name = f"task {task.name!r}" if task is not None else "this engine"
        raise TaskError(f"{name} has no labels to choose from", fix="call generate instead")
    tokens = [settings.answer_prefix + tokenizer.answer_ids(label) for label in task.labels]
    return Labels(task.labels, tokens, settings.eos_token_id, scored_end=settings.answer_ends)


def score(steps: Steps, labels: Sequence[Labels], at_once: int) -> list[Classification]:
    """Return the class of every text of a batch.

    Args:
        steps: the texts, before the first step.
        labels: those of each text.
        at_once: pairs of text and label the decoder gets at once, which bounds its memory.
    """
    pairs = [(row, path) for row, own in enumerate(labels) for path in own.paths]
    rows = np.array([row for row, _ in pairs])
    # Short paths are filled with any token: nothing that counts comes after it.
    paths = np.zeros((len(pairs), max(own.longest for own in labels)), np.int64)
    for filled, (_, path) in zip(paths, pairs, strict=True):
        filled[: len(path)] = path
    answers: list[Classification] = []
    waiting: list[NumpyArray] = []
    for start in range(0, len(pairs), at_once):
        some = slice(start, start + at_once)
        waiting.extend(steps.after(rows[some], paths[some]))
        while len(answers) < len(labels):
            own = labels[len(answers)]
            count = len(own.paths)
            if len(waiting) < count:
                break
            answers.append(own.answer(np.stack(waiting[:count]).astype(np.float32)))
            waiting = waiting[count:]
    return answers
