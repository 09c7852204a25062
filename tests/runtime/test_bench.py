"""`eptc bench`: what it measures and what it refuses. How long anything takes is not tested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import eptc
from eptc.errors import OptionError


def test_every_shape_is_measured(classifier: Any, cli: Callable[..., Any]) -> None:
    done = cli(
        "bench", classifier.path, "--batch", "1,3", "--length", "4,7", "--repeat", 5,
        "--threads", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    report = done.json
    assert [(row["batch"], row["length"]) for row in report["shapes"]] == [
        (1, 4), (1, 7), (3, 4), (3, 7),
    ]  # fmt: skip
    for row in report["shapes"]:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["rows_per_second"] == pytest.approx(row["batch"] / row["median_ms"] * 1e3)
    assert (report["threads"], report["repeat"]) == (1, 5)
    assert report["providers"] == ["CPUExecutionProvider"]


def test_written_tokens_are_counted(lowered_t5: Any) -> None:
    report = eptc.bench(lowered_t5.path, batches=[2], lengths=[5], new_tokens=3, repeat=2)
    (row,) = report["shapes"]
    assert 2 <= row["new_tokens"] <= 6
    assert row["tokens_per_second"] == pytest.approx(row["new_tokens"] / row["median_ms"] * 1e3)


def test_the_table_has_a_line_for_each_shape(classifier: Any, cli: Callable[..., Any]) -> None:
    done = cli("bench", classifier.path, "--batch", "2", "--length", "11,13", "--repeat", 1)
    assert done.code == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
    assert [row[1:3] for row in cells if len(row) > 3] == [["2", "11"], ["2", "13"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch", "1,x"), "--batch is '1,x'"),
        (("--batch", "0"), "batch is [0]"),
        (("--length", "-3"), "length is [-3]"),
        (("--repeat", "0"), "repeat is [0]"),
        (("--threads", "0"), "threads is 0"),
        (("--max-new-tokens", "4"), "writes no tokens"),
        (("--provider", "abacus"), "abacus cannot start"),
    ],
)
def test_bad_options_are_refused(
    classifier: Any, cli: Callable[..., Any], options: tuple[str, ...], said: str
) -> None:
    done = cli("bench", classifier.path, *options)
    assert done.code == 2
    assert said in done.stderr


def test_a_length_without_positions_is_refused(lowered_llama: Any) -> None:
    settings = eptc.Engine.load(lowered_llama.path).manifest.generation
    assert settings is not None
    positions = settings.max_positions
    assert positions is not None
    with pytest.raises(eptc.errors.InputError, match="do not fit"):
        eptc.bench(lowered_llama.path, batches=[1], lengths=[positions], new_tokens=1, repeat=1)


def test_no_batch_is_refused(classifier: Any) -> None:
    with pytest.raises(OptionError, match="batch"):
        eptc.bench(classifier.path, batches=[])
