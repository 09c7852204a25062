"""Which answers are taken for the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.answers import difference
from benchmarks.cases import Case

LOGITS = Case("logits", "tiny-bert", "classify", 2, 8)
TOKENS = Case("tokens", "tiny-t5", "generate", 1, 8, new_tokens=4)
RIGHT = np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)
WRITTEN = np.array([[7, 8, 9, 9]])


@pytest.mark.parametrize(
    ("case", "answer", "right", "off", "wrong"),
    [
        (LOGITS, RIGHT, RIGHT, 0.0, None),
        (LOGITS, RIGHT + np.float32(0.03125), RIGHT, 0.03125, None),
        (LOGITS, RIGHT + np.float32(0.125), RIGHT, 0.125, "off by 0.125"),
        (LOGITS, RIGHT * np.nan, RIGHT, np.nan, "off by nan"),
        (LOGITS, RIGHT[:1], RIGHT, None, "shape"),
        (LOGITS, RIGHT, None, None, None),
        (TOKENS, WRITTEN, WRITTEN, 0.0, None),
        (TOKENS, WRITTEN + np.array([0, 0, 0, 1]), WRITTEN, 0.25, None),
        (TOKENS, WRITTEN[:, :3], WRITTEN, None, "not 4 a row"),
        (TOKENS, WRITTEN[:, :3], None, None, "not 4 a row"),
    ],
)
def test_difference(
    case: Case, answer: Any, right: Any, off: float | None, wrong: str | None
) -> None:
    found, said = difference(answer, right, case, same_weights=True)
    assert found == pytest.approx(off, nan_ok=True)
    assert (said is None) == (wrong is None)
    assert (wrong or "") in (said or "")


def test_the_base_has_answers_of_its_own() -> None:
    assert difference(RIGHT + 9, RIGHT, LOGITS, same_weights=False) == (None, None)
    cut = difference(WRITTEN[:, :2], WRITTEN, TOKENS, same_weights=False)
    assert cut[1] is not None
