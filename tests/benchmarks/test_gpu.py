"""The benchmark on a GPU, run on a CPU and a model of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu, turns
from eptc.runtime import probe_providers


def test_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_TURN", 0.0)
    out = tmp_path / "gpu.json"
    contestants = [gpu.ENGINE, gpu.CAPTURED, gpu.EAGER]
    code = gpu.main([
        "--device", "cpu", "--models", "tiny-bert", "--precisions", "fp32", "--rounds", "6",
        "--batches", "1,2", "--lengths", "5", "--contestants", ";".join(contestants),
        "--folder", str(tmp_path / "bench"), "--out", str(out),
    ])  # fmt: skip
    assert code == 0
    found = json.loads(out.read_text())
    assert found["device"]["name"] == "cpu"
    assert {"torch", "transformers"} <= set(found["conditions"]["versions"])
    assert [(case["batch"], case["length"]) for case in found["cases"]] == [(1, 5), (2, 5)]
    for case in found["cases"]:
        assert case["off_by"] < 1e-4
        assert list(case["milliseconds"]) == contestants
        for ratio in case["ratios"].values():
            assert ratio["low"] <= ratio["estimate"] <= ratio["high"]
            assert ratio["rounds"] == 6


def test_ratios_are_the_others_by_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2: the engine is twice as fast."""

    def timed(calls: dict[str, gpu.Call], rounds: int) -> dict[str, list[float]]:
        return {name: [1.0 if name == gpu.ENGINE else 2.0] * rounds for name in calls}

    monkeypatch.setattr(gpu, "_timed", timed)
    out = tmp_path / "gpu.json"
    gpu.main([
        "--device", "cpu", "--models", "tiny-bert", "--precisions", "fp32", "--batches", "1",
        "--lengths", "4", "--contestants", "engine;PyTorch eager", "--out", str(out),
        "--folder", str(tmp_path / "bench"),
    ])  # fmt: skip
    (case,) = json.loads(out.read_text())["cases"]
    assert case["milliseconds"] == {"engine": 1000.0, "PyTorch eager": 2000.0}
    assert case["ratios"]["PyTorch eager"]["estimate"] == 2.0


def test_answers_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"model": "x", "precision": "fp16", "off_by": 0.3}
    monkeypatch.setattr(gpu, "measure", lambda *_: [case])
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--models", "tiny-bert", "--out", str(out)]) == 1
    assert "answers differ by 0.3: x" in capsys.readouterr().err


def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says why, writes nothing, and measures nothing else instead."""
    if probe_providers().get("CUDAExecutionProvider", "") is None:
        pytest.skip("there is a GPU on this machine")
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 2
    assert "there is no GPU to measure on" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("names", ["PyTorch eager", "engine;tensorflow"])
def test_wrong_contestants(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--contestants", names])
    assert names in capsys.readouterr().err
