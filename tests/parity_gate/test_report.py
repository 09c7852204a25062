"""The report: when it has passed, what it says, that it is JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from eptc.errors import ParityError
from eptc.parity_gate import ParityReport, refuse
from eptc.parity_gate.compare import FP32, compare, not_run
from eptc.parity_gate.outputs import Decision

GOOD = compare("logits, a", np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-6]), FP32)
WORSE = compare("logits, b", np.array([1.0]), np.array([1.0 - 9e-6]), FP32)
BAD = compare("logits, c", np.array([1.0, 5.0]), np.array([1.0, 4.0]), FP32)
NAN = compare("logits, d", np.array([math.nan]), np.array([1.0]), FP32)

SURE = Decision("a", 3, 2, agrees=False, margin=0.5, noise=1e-4)
TIE = Decision("a", 0, 0, agrees=False, margin=1e-5, noise=1e-4)
SAME = Decision("a", 1, 0, agrees=True, margin=0.5, noise=1e-4)


def report(*outcomes: Any, **changes: Any) -> ParityReport:
    made = ParityReport(
        probes=({"name": "a", "shape": [1, 2], "synthetic": True, "rows_left_out": 0},),
        bound=FP32,
        layers={"the native reader": 0.1},
        weights=0.2,
        tensors=tuple(o for o in outcomes if not isinstance(o, Decision)),
        decisions=tuple(o for o in outcomes if isinstance(o, Decision)),
        tokenized=3,
    )
    return dataclasses.replace(made, **changes)


def test_passed() -> None:
    good = report(GOOD, WORSE, SAME, TIE)
    assert good.passed
    assert good.worst is WORSE
    refuse(good, "nobody")
    assert good.summary()["ties"] == 1
    assert good.summary()["flips"] == 0
    assert good.summary()["largest_error"] == 9e-06
    assert [entry["margin"] for entry in good.to_json()["undecided"]] == [1e-05]


@pytest.mark.parametrize(
    ("failed", "message"),
    [
        (
            (GOOD, BAD, NAN),
            "2 of 3 output tensors differ.*\nfirst: logits, c .*\nworst: logits, d",
        ),
        ((GOOD, BAD), r"element \[1\] is 5, the reference has 4: off by 1, allowed 0.00012"),
        ((GOOD, BAD), "0.25 would have passed"),
        ((GOOD, SURE, TIE), "1 decisions differ.* on a, row 3, step 2: .*sure by 0.5, noise"),
        ((not_run("a: the engine does not run: no"),), "1 of 1 .*\nfirst: a: the engine does not"),
        ((), "no output was compared"),
        ((SAME,), "no output was compared"),
    ],
)
def test_refused(failed: Any, message: str) -> None:
    bad = report(*failed)
    assert not bad.passed
    with pytest.raises(ParityError, match=f"(?s){message}") as raised:
        refuse(bad, "the pass that did it")
    assert raised.value.fix == "the pass that did it"
    assert raised.value.exit_code == 1


ROUTED = dataclasses.replace(GOOD, shape=(8, 2))


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        ([(4, False), (4, True)], None),
        ([(7, False), (0, True)], None),
        ([(5, False), (4, True)], "9 of 16 rows"),
        ([(8, False), (8, True)], "16 of 16 rows"),
        # A row of seeded tokens says nothing about text.
        ([(8, False), (0, True)], "every row of text"),
        ([(8, True), (0, True)], None),
    ],
)
def test_too_little_compared(left_out: list[tuple[int, bool]], found: str | None) -> None:
    """Rows that the reference itself is not sure of prove nothing."""
    probes = tuple(
        {"name": str(i), "shape": [8, 3], "synthetic": synthetic, "rows_left_out": rows}
        for i, (rows, synthetic) in enumerate(left_out)
    )
    tensors = [dataclasses.replace(ROUTED, left_out=rows) for rows, _ in left_out]
    made = report(*tensors, probes=probes)
    assert made.agrees
    assert made.passed is (found is None)
    assert made.summary()["rows"] == 16
    if found is not None:
        with pytest.raises(ParityError, match=f"too little was compared: {found}.*experts"):
            refuse(made, "nobody")


def test_nothing_passes_what_is_infinite() -> None:
    with pytest.raises(ParityError) as raised:
        refuse(report(NAN), "x")
    assert "would have passed" not in str(raised.value)


@pytest.mark.parametrize("outcomes", [(GOOD, SAME), (BAD, NAN, SURE, TIE), (not_run("no"),)])
def test_json_is_finite(outcomes: Any) -> None:
    """No NaN, no infinity: what a strict reader of JSON takes."""
    text = json.dumps(report(*outcomes, weights=math.inf).to_json(), allow_nan=False)
    assert json.loads(text)["summary"]["passed"] is (outcomes == (GOOD, SAME))


def test_scores_are_kept() -> None:
    scored = report(GOOD, scores={"rows": 3})
    assert scored.to_json()["scores"] == {"rows": 3}
