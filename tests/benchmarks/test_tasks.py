"""The benchmark of several tasks in one engine, on models of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tasks, turns


@pytest.mark.parametrize("clock", ["wall", "thread"])
def test_measures(tmp_path: Path, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_TURN", 0.0)
    monkeypatch.setattr(tasks, "SHAPES", ((2, 5),))
    tasks.main([
        "--models", "tiny-bert,tiny-t5", "--rounds", "6", "--threads", "1", "--clock", clock,
        "--folder", str(tmp_path), "--results", str(tmp_path),
    ])  # fmt: skip
    for model, graphs in (("tiny-bert", ["model"]), ("tiny-t5", ["decoder", "encoder"])):
        found = json.loads((tmp_path / "tasks" / f"{model}-{clock}-1.json").read_text())
        assert [case["graph"] for case in found["cases"]] == graphs
        for case in found["cases"]:
            assert case["off_by"] < 1e-4
            assert case["ratio"]["low"] <= case["ratio"]["estimate"] <= case["ratio"]["high"]
        assert found["conditions"]["clock"] == clock


def test_one_thread_has_a_clock_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tasks.main(["--clock", "thread", "--threads", "2"])
    assert "--threads 1" in capsys.readouterr().err
