"""What parity is checked on: real text in several shapes, or seeded tokens marked synthetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eptc.examples_file import Example
from eptc.runtime.spec import TASK_IDS
from eptc.tasks import Task

__all__ = [
    "Example",
    "Probe",
    "builtin_examples",
    "odd_examples",
    "synthetic",
    "text_batches",
]

Ints = npt.NDArray[np.int64]

_TEXTS = (
    "A warm, funny and quietly moving film that stays with you for days.",
    "The plot makes no sense at all, and by the second hour I wanted my money back.",
    "Fine.",
    "The committee approved the budget on Tuesday after a debate that lasted four hours.",
    "Rain is expected in the north this evening, with clear skies returning by Friday morning.",
    "Who wrote the opera that opens the season?",
    "The battery died after three days; support never answered, and the replacement (which I "
    "paid for!) arrived broken as well.",
    "Turn off the lights in the kitchen.",
    "Ten of the twelve samples were contaminated, so the team repeated the whole experiment.",
    "Nobody in the village had ever seen the river so low.",
    "Zo\u00eb's caf\u00e9 \u2014 na\u00efve, but charming \u2014 costs \u20ac4.50 a cup.",
    "she said that he said that they would have said something if anyone had asked them",
    "Congratulations, you have been selected! Click the link below to claim your free prize now.",
    "The river has not been this low in living memory, according to the people of the village.",
    "x",
    "In spite of its modest length the report covers a great deal of ground: it traces how the "
    "bridge was planned, why the first contractor withdrew, what the engineers found when they "
    "opened the northern pier, and how a sum that had been set aside for painting ended up paying "
    "for an entirely new set of bearings, which, as it turned out, were never needed at all.",
)

# For the tokenizers alone: white space, characters no vocabulary has, what looks special.
_ODD = (
    "  two  spaces, and one behind ",
    "a line\nand another\twith a tab",
    "UPPER lower Title x2 3.14 1,000 a_b-c/d e@f.org #g",
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441 \u0639\u0631 \U0001f600 e\u0301 \ufb01 \u00a0 \u200b",
    "<pad></s><s><unk>[CLS][SEP][MASK]<extra_id_0>",
)

# Tokens of the longest seeded sequence: beyond the distance T5's position bias tells apart.
LONGEST = 160
# Where more tokens fit than this, cutting is not tried: the text would be a book.
_LONGEST_CUT = 8192


@dataclasses.dataclass(frozen=True)
class Probe:
    """One batch.

    Args:
        name: for the report.
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, sequence].
        token_type_ids: int64 [batch, sequence]; None where the model reads none.
        synthetic: whether the tokens are drawn, not text.
        answer: what a decoder is fed, int64 [batch, length]; None: what the reference writes.
        task_ids: the task of each row, by its place in the engine's list, int64 [batch]; None:
            all are of the engine's one task.
    """

    name: str
    input_ids: Ints
    attention_mask: Ints
    token_type_ids: Ints | None = None
    synthetic: bool = False
    answer: Ints | None = None
    task_ids: Ints | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, sequence]."""
        return self.input_ids.shape

    def feeds(self) -> dict[str, Ints]:
        """Return the arrays by the names graphs and models know them by."""
        feeds = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            feeds["token_type_ids"] = self.token_type_ids
        return feeds | self.told

    @property
    def told(self) -> dict[str, Ints]:
        """What every graph of an engine of several tasks is told of the rows."""
        return {} if self.task_ids is None else {TASK_IDS: self.task_ids}


def builtin_examples(task: Task | None) -> list[Example]:
    """Return examples of a task's fields made of the texts above, each field a different one."""
    fields = task.fields if task is not None else ("text",)
    return [
        {name: _TEXTS[(i + 3 * j) % len(_TEXTS)] for j, name in enumerate(fields)}
        for i in range(len(_TEXTS))
    ]


def text_batches(examples: Sequence[Example]) -> list[tuple[str, list[Example]]]:
    """Return named batches in several shapes: one row, a few rows of unequal length, many.

    Rows of unequal length make padding; the shortest and the longest text stand alone.
    """
    by_length = sorted(examples, key=lambda example: (len(str(example)), str(example)))
    batches = [
        ("shortest text alone", by_length[:1]),
        ("longest text alone", by_length[-1:]),
        ("shortest and longest together", [by_length[0], by_length[-1]]),
    ]
    batches += [
        (
            f"texts {start} to {min(start + 8, len(examples)) - 1}",
            list(examples[start : start + 8]),
        )
        for start in range(0, min(len(examples), 32), 8)
    ]
    return batches


def odd_examples(task: Task, limit: int | None) -> list[Example]:
    """Return texts for the tokenizers alone: odd characters, and such as must be cut.

    Args:
        task: whose fields they have.
        limit: tokens above which a text is cut; None where it never is.
    """
    odd: list[Example] = [dict.fromkeys(task.fields, text) for text in _ODD]
    if limit is None or limit > _LONGEST_CUT:
        return odd
    # More words than tokens fit, in every field at once and in each alone.
    words = " ".join(_TEXTS).split()
    long = " ".join(words[i % len(words)] for i in range(limit + 8))
    odd.append(dict.fromkeys(task.fields, long))
    if len(task.fields) > 1:
        odd += [
            {name: long if name == field else _TEXTS[0] for name in task.fields}
            for field in task.fields
        ]
    return odd


def synthetic(
    vocab_size: int,
    limit: int | None,
    *,
    token_types: int,
    left: bool,
    answers: int | None = None,
    rows: int = 0,
    seed: int = 0,
) -> list[Probe]:
    """Return seeded tokens in shapes that text may not give.

    Length 1, odd sizes, up to the limit; the first and the last token of the vocabulary; every
    token type; padding of every length, and a mask with holes.

    Args:
        vocab_size: ids are below it.
        limit: longest sequence the model takes; None where there is no limit.
        token_types: how many types of tokens the model knows; 0 where it reads none.
        left: whether padding stands on the left.
        answers: the start token of answers to feed a decoder, longer than it would write; None:
            no such probe.
        rows: of one more batch, where the model treats that many in a way of their own.
        seed: of the tokens.
    """
    rng = np.random.default_rng(seed)
    longest = min(limit or LONGEST, LONGEST)
    shapes = [(1, 1), (3, 1), (1, 2), (2, 17), (4, 33), (1, longest)]
    if rows:
        shapes.append((rows, 5))
    probes = []
    for batch, length in [(batch, min(length, longest)) for batch, length in shapes]:
        ids = rng.integers(0, vocab_size, (batch, length), dtype=np.int64)
        ids[0, 0], ids[0, -1] = 0, vocab_size - 1
        types = rng.integers(0, token_types, ids.shape, dtype=np.int64) if token_types else None
        name = f"seeded tokens {batch}x{length}"
        probes.append(Probe(name, ids, _mask(rng, batch, length, left), types, synthetic=True))
    if answers is not None:
        fed = rng.integers(0, vocab_size, (2, LONGEST), dtype=np.int64)
        fed[:, 0] = answers
        two = probes[3]
        name = f"{two.name}, seeded answer {LONGEST}"
        probes.append(dataclasses.replace(two, name=name, answer=fed))
    return probes


def _mask(rng: np.random.Generator, batch: int, length: int, left: bool) -> Ints:
    """Return a mask [batch, length]: row 0 is full, the last of four has holes."""
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        gap = int(rng.integers(0, length))
        mask[row, :gap] = 0  # at least one token stays
        if not left:
            mask[row] = mask[row, ::-1]
    if batch == 4:
        mask[-1, 1:-1] = rng.integers(0, 2, length - 2) if length > 2 else 1
        mask[-1, [0, -1]] = 1
    return mask
