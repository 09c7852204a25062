"""Precision plans: read, checked, written the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eptc.errors import InputError, OptionError
from eptc.precision_plan import PrecisionPlan

KNOWN = {"a.weight": ("fp32", "int8"), "b.weight": ("fp32", "int8", "int4"),
         "head.weight": ("fp32",)}  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    """A plan that was written is read as it was; further keys are nobody's business."""
    plan = PrecisionPlan({"b.weight": "int4", "a.weight": "fp32"})
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(plan.to_json() | {"search": {"evaluations": 3}}))
    read = PrecisionPlan.read(path)
    assert read == plan
    assert (read.of("int4"), read.of("int8")) == (("b.weight",), ())
    assert list(plan.to_json()["weights"]) == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has no 'weights'"),
        ('{"schema_version": 1}', "has no 'weights'"),
        ('{"schema_version": 2, "weights": {}}', "schema_version 2"),
        ('{"schema_version": 1, "weights": {"a": "int3"}}', "stores a as 'int3'"),
    ],
)
def test_no_plan(tmp_path: Path, content: str, message: str) -> None:
    """What is wrong with the file is said."""
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        PrecisionPlan.read(path)


def test_no_file(tmp_path: Path) -> None:
    """A missing file is bad input."""
    with pytest.raises(InputError, match="cannot be read"):
        PrecisionPlan.read(tmp_path / "none.json")


def test_names() -> None:
    """Every weight that has a choice must be there, and no other; typing errors are helped."""
    whole: dict[str, Any] = {"a.weight": "int8", "b.weight": "int4"}
    PrecisionPlan(whole).check_names(KNOWN)
    PrecisionPlan(whole | {"head.weight": "fp32"}).check_names(KNOWN)
    with pytest.raises(OptionError, match=r"head.weight as int8"):
        PrecisionPlan(whole | {"head.weight": "int8"}).check_names(KNOWN)
    with pytest.raises(OptionError, match=r"did you mean 'a.weight'"):
        PrecisionPlan(whole | {"a.weigth": "fp32"}).check_names(KNOWN)
    with pytest.raises(OptionError, match=r"lacks b.weight"):
        PrecisionPlan({"a.weight": "int8"}).check_names(KNOWN)
    with pytest.raises(OptionError, match=r"a.weight as int4"):
        PrecisionPlan(whole | {"a.weight": "int4"}).check_names(KNOWN)
