"""One tiny case and one tiny build, end to end. How long anything takes is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.results import read


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    code = main([
        "--cases", "tiny-bert,tiny-t5-build", "--only", "base,unfolded,folded,optimum", "--quick",
        "--threads", "1", "--folder", str(folder / "made"), "--results", str(folder / "results"),
        "--optimum-python", str(folder / "not-there"),
    ])  # fmt: skip
    assert code == 0
    return folder / "results"


def test_every_contestant_is_measured_or_says_why_not(ran: Path) -> None:
    results = read(ran / "tiny-bert.json")
    case = results.case
    assert case is not None
    assert results.conditions.quick
    assert results.conditions.threads == 1
    timings = {timing.contestant: timing for timing in case.timings}
    assert set(timings) == {"eptc", "base", "unfolded", "folded", "optimum"}
    assert timings["optimum"].status == "failed"
    assert "not set up" in str(timings["optimum"].reason)
    for name in ("eptc", "base", "unfolded", "folded"):
        timing = timings[name]
        assert timing.status == "measured"
        assert len(timing.seconds) == len(timing.engine) == case.rounds
        assert min(timing.seconds) > 0
        assert (timing.ratio is None) == (name == "eptc")


def test_answers_are_compared(ran: Path) -> None:
    case = read(ran / "tiny-bert.json").case
    assert case is not None
    off = {timing.contestant: timing.difference for timing in case.timings}
    assert off["unfolded"] == 0
    for name in ("eptc", "folded"):
        difference = off[name]
        assert difference is not None
        assert difference < 1e-4
    assert off["base"] is None  # it has other weights


def test_builds_are_measured(ran: Path) -> None:
    build = read(ran / "tiny-t5-build.json").build
    assert build is not None
    assert [measure.name for measure in build.measures] == ["cold", "second", "copy", "hf"]
    for measure in build.measures:
        assert measure.status == "measured"
        assert min(measure.seconds) > 0
        assert (measure.size or 0) > 0
    cold = build.measures[0]
    # torch alone is larger than this; the suite's own process is not.
    assert min(cold.peak_rss) > 150 * 2**20
    assert set(build.ratios) == {
        "second / cold, seconds", "second / cold, peak memory", "hf / copy, seconds",
    }  # fmt: skip


def test_the_report_is_written(ran: Path) -> None:
    text = (ran / "report.md").read_text()
    assert "### tiny-bert" in text
    assert "### tiny-t5-build" in text
    assert "optimum-onnx, ORTModel did not run" in text


def test_an_unknown_case_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "minilm,enormous", "--results", str(tmp_path)]) == 2
    assert "there is no case 'enormous'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
