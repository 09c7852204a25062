"""The benchmark of routed experts: it runs, compares before it times, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import routing


@pytest.mark.parametrize(
    ("model", "graphs"), [("tiny-bert", {"model"}), ("tiny-t5", {"encoder", "decoder"})]
)
def test_a_tiny_model(
    model: str, graphs: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three contestants of one model give one answer; both overheads are measured."""
    options = ["--models", model, "--rounds", "1", "--threads", "1", "--shared"]
    routing.main([*options, "--folder", str(tmp_path), "--results", str(tmp_path / "results")])

    printed = capsys.readouterr().out
    assert f"{model}: " in printed
    found = json.loads((tmp_path / "results" / "routing" / f"{model}-shared.json").read_text())
    assert {case["graph"] for case in found["cases"]} == graphs
    for case in found["cases"]:
        assert case["exported_off_by"] < 1e-4
        assert case["milliseconds"].keys() == {routing.BASE, routing.ENGINE, routing.EXPORTED}
