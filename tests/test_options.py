"""Options: what contradicts itself is refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from eptc.errors import OptionError
from eptc.options import Options
from eptc.precision import check_target
from eptc.tasks import Task

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "int3"}, "the precision is 'int3'"),
    "target": ({"target": "coreml"}, "the target is 'coreml'"),
    "provider": ({"optimize_for": "tpu"}, "the provider to optimize for is 'tpu'"),
    "method": (
        {"precision": "int8-static", "calibration": "x", "calibration_method": "mean"},
        "the calibration method is 'mean'",
    ),
    "probe": ({"probe": "x", "verify": False}, "--probe was given together with --no-verify"),
    "bf16 on a CPU": ({"precision": "bf16"}, "--precision bf16 does not run"),
    "int8 on CUDA": ({"precision": "int8", "optimize_for": "cuda"}, "--precision int8 does not"),
    "int4 anywhere": ({"precision": "int4", "optimize_for": "any"}, "--precision int4 does not"),
    "auto on CUDA": ({"precision": "auto", "optimize_for": "cuda"}, "--precision auto does not"),
    "fp8 on a CPU": ({"precision": "fp8", "calibration": "x"}, "--precision fp8 does not run"),
    "fp8 without ranges": (
        {"precision": "fp8", "optimize_for": "any"}, "--precision fp8 fixes the range",
    ),
    "entropy for fp8": (
        {
            "precision": "fp8", "optimize_for": "any", "calibration": "x",
            "calibration_method": "entropy",
        },
        "ranges of 128 equal steps",
    ),
    "fp8 between fp16 on a CPU": (
        {"precision": "fp8-fp16", "calibration": "x"}, "--precision fp8-fp16 does not run",
    ),
    "int8 between fp16 on CUDA": (
        {"precision": "int8-fp16", "calibration": "x", "optimize_for": "cuda"},
        "8 bits between 16-bit values are for TensorRT",
    ),
    "int8 between fp16 without ranges": (
        {"precision": "int8-fp16", "target": "tensorrt"}, "--precision int8-fp16 fixes the range",
    ),
    "entropy for fp8 between fp16": (
        {
            "precision": "fp8-fp16", "optimize_for": "any", "calibration": "x",
            "calibration_method": "entropy",
        },
        "ranges of 128 equal steps",
    ),
    "no ranges": ({"precision": "int8-static"}, "was given no text"),
    "needless ranges": ({"precision": "int8", "calibration": "x"}, "--precision int8 needs none"),
    "data for fp32": ({"data": "x"}, "--precision fp32 changes no answer"),
    "drop without data": ({"precision": "int8", "max_drop": 1.0}, "no data to measure it on"),
    "flips without data": ({"precision": "int8", "max_flips": 0.1}, "no data to measure it on"),
    "negative drop": ({"precision": "int8", "data": "x", "max_drop": -1.0}, "--max-drop is -1"),
    "no number": (
        {"precision": "int8", "data": "x", "max_drop": float("nan")}, "--max-drop is nan",
    ),
    "flips above all": ({"precision": "int8", "data": "x", "max_flips": 2.0}, "--max-flips is 2"),
    "no budget": ({"precision": "auto", "data": "x"}, "has no budget to keep"),
    "no evaluations": (
        {"precision": "auto", "data": "x", "max_drop": 1.0, "search_evaluations": 1},
        "--search-evaluations is 1",
    ),
    "no time": (
        {"precision": "auto", "data": "x", "max_drop": 1.0, "search_minutes": 0.0},
        "--search-minutes is 0",
    ),
    "evaluations without a search": (
        {"precision": "int8", "search_evaluations": 100},
        "--search-evaluations was given, and nothing is searched for --precision int8",
    ),
    "minutes without a search": (
        {"search_minutes": 1.0},
        "--search-minutes was given, and nothing is searched for --precision fp32",
    ),
    "minutes for a plan": (
        {"precision": "auto", "precision_plan": "x", "search_minutes": 1.0},
        "--search-minutes was given, and nothing is searched for a plan",
    ),
    "plan for int8": (
        {"precision": "int8", "precision_plan": "x"}, "together with --precision int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions(case: str) -> None:
    """Each names what is wrong, and what would be right or what to do."""
    given, message = REFUSED[case]
    with pytest.raises(OptionError) as caught:
        Options("sentiment", **given).check()
    assert message in caught.value.found
    assert caught.value.expected or caught.value.fix


def test_what_runs_instead() -> None:
    """A precision that a provider cannot run names the ones it can."""
    with pytest.raises(OptionError) as caught:
        Options("sentiment", precision="bf16", optimize_for="cpu").check()
    assert "--optimize-for cuda or any" in str(caught.value)
    assert "int8" in str(caught.value)


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4", "auto"])
def test_what_tensorrt_does_not_read(precision: Any) -> None:
    """Each names what it reads instead."""
    with pytest.raises(OptionError, match=f"--precision {precision} was given") as caught:
        check_target(precision, "tensorrt")
    expected = caught.value.expected or ""
    known_to_it = ("fp32", "keep", "fp16", "bf16", "int8-static", "fp8", "int8-fp16", "fp8-fp16")
    assert f"{', '.join(known_to_it)};" in expected
    for name in known_to_it:
        known: Any = name
        check_target(known, "tensorrt")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"precision": "fp8", "calibration": "x", "optimize_for": "any"},
        {
            "precision": "fp8",
            "calibration": "x",
            "optimize_for": "any",
            "calibration_method": "percentile",
        },
        {"precision": "int8-fp16", "calibration": "x", "optimize_for": "any"},
        {
            "precision": "int8-fp16",
            "calibration": "x",
            "target": "tensorrt",
            "calibration_method": "entropy",
        },
        {"precision": "fp8-fp16", "calibration": "x", "target": "tensorrt"},
        {"precision": "fp16"},
        {"precision": "bf16", "optimize_for": "cuda"},
        {"precision": "int8-static", "calibration": "x", "optimize_for": "any"},
        {"precision": "auto", "data": "x", "max_flips": 0.01},
        {"precision": "auto", "data": "x", "max_drop": 1.0, "search_evaluations": 5},
        {"precision": "auto", "precision_plan": "x"},
        {"precision": "int4", "data": "x", "max_drop": 0.0},
    ],
)
def test_sound(given: dict[str, Any]) -> None:
    """What belongs together passes."""
    Options("sentiment", **given).check()


def test_budgets_need_what_they_count() -> None:
    """Text without labels has no score; a value does not flip."""
    options = Options("t", precision="int8", data="x", max_flips=0.01)
    with pytest.raises(OptionError, match="has no labels"):
        options.check_task(Task("t", "generation"))
    with pytest.raises(OptionError, match="has 1 labels"):
        options.check_task(Task("t", "text-to-text", ("text",), "{text}", labels=("yes",)))
    with pytest.raises(OptionError, match="is a regression"):
        options.check_task(Task("t", "regression"))
    options.check_task(Task("t", "classification", labels=("a", "b")))
    Options("t", precision="int8", data="x").check_task(Task("t", "regression"))
