"""`--precision all`: every precision of one engine side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import eptc
from eptc import comparison, comparison_report
from eptc.errors import InputError, OptionError, OutputError
from eptc.precision import SCHEMES, Precision
from eptc.runtime import Engine

pytest.importorskip("matplotlib")

EVERY = set(SCHEMES) - {"keep"}  # the base is float32: `keep` has nothing to keep
BUDGET = 0.5  # points: more than int8 loses; less than int4, int8-static and what is usual


@pytest.fixture(scope="module")
def compare(small_native: Any, small_rows: Any) -> Callable[..., eptc.comparison.Comparison]:
    """Return a function that compares the precisions of the small checkpoint's regression."""

    def run(out: Path, **options: Any) -> Any:
        given = {"data": small_rows.values, "calibration": small_rows.texts, **options}
        return eptc.compare_precisions(
            small_native.ckpt, base=small_native.base, task="score", out=out, **given
        )

    return run


@pytest.fixture(scope="module")
def compared(compare: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compare(tmp_path_factory.mktemp("all") / "out", max_drop=BUDGET)


def test_every_precision_is_a_row(compared: Any) -> None:
    """Built or refused with the reason; each bundle is where its row says."""
    rows = {row.precision: row for row in compared.rows}
    assert set(rows) == EVERY
    refused = {name: row.refused for name, row in rows.items() if row.refused is not None}
    assert set(refused) == {"bf16", "fp8", "fp8-fp16", "int4", "int8-fp16", "int8-static"}
    assert "does not run" in refused["bf16"]
    for name in ("int4", "int8-static"):
        assert "the pearson drops by" in refused[name]
        assert refused[name].endswith("allowed are 0.5")
    for name in EVERY - set(refused):
        manifest = json.loads((compared.path / name / "manifest.json").read_text())
        assert manifest["precision"] == ("mixed" if name == "auto" else name)
        size = sum(record["size"] for record in manifest["files"].values())
        assert rows[name].bundle_bytes == size
    assert not (compared.path / "int4").exists()
    exact = rows["fp32"]
    assert (exact.drop, exact.flips, exact.cosine, exact.score) == (0, 0, 1, 1)
    assert rows["int8"].weight_bytes < 0.3 * exact.weight_bytes
    assert 0 < rows["int8"].drop <= BUDGET
    assert rows["int8"].milliseconds > 0
    assert rows["fp16"].milliseconds is rows["fp16"].time_of_fp32 is None  # simulated
    assert exact.time_of_fp32 == 1
    assert rows["int8"].time_of_fp32 > 0


def test_auto_keeps_the_budget(compared: Any) -> None:
    """It is smaller than one level for all, and its plan was chosen on the rows of its score."""
    rows = {row.precision: row for row in compared.rows}
    auto = rows["auto"]
    assert 0 < auto.drop <= BUDGET
    assert auto.weight_bytes < rows["int8"].weight_bytes
    assert {row.precision for row in compared.rows if row.note} == {"auto"}
    assert "chosen on these rows" in auto.note
    assert f"auto: {auto.note}" in (compared.path / "comparison.md").read_text()


def test_two_engines_at_once(compared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, each is timed beside float32's alone."""
    held: list[Engine] = []
    most: list[int] = []
    load, close = Engine.load, Engine.close

    def loaded(*given: Any, **options: Any) -> Engine:
        engine = load(*given, **options)
        held.append(engine)
        most.append(len(held))
        return engine

    def closed(engine: Engine) -> None:
        held.remove(engine)
        close(engine)

    monkeypatch.setattr(Engine, "load", loaded)
    monkeypatch.setattr(Engine, "close", closed)
    names: tuple[Precision, ...] = ("fp32", "int8", "int8-weights", "auto")
    bundles = {name: compared.path / name for name in names}
    times = comparison._latencies(bundles, [{"text": "good"}, {"text": "a long and dull film"}])
    assert tuple(times) == names
    assert (len(most), max(most), held) == (4, 2, [])
    assert comparison._latencies({"fp32": bundles["fp32"]}, [{"text": "good"}])["fp32"][1] == 1


def test_files(compared: Any) -> None:
    """One table in two forms, and a plot that shows what was built."""
    data = json.loads((compared.path / "comparison.json").read_text())
    assert data["metric"] == "pearson"
    assert data["examples"] == 120
    assert {row["precision"] for row in data["rows"]} == EVERY
    table = (compared.path / "comparison.md").read_text()
    for row in compared.rows:
        assert row.precision in table
        if row.refused is not None:
            assert row.refused in table
    drawing = ElementTree.parse(compared.path / "comparison.svg")
    texts = [node.text or "" for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    shown = {name for text in texts for name in text.split(", ")} & EVERY
    assert shown == {row.precision for row in compared.rows if row.refused is None}


def test_plot_is_the_same_every_time(compared: Any, tmp_path: Path) -> None:
    for name in ("one", "other"):
        comparison_report.draw(compared, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert (tmp_path / "one.svg").read_bytes() == (compared.path / "comparison.svg").read_bytes()


def test_refused_at_once(compare: Any, tmp_path: Path) -> None:
    """What is wrong with all of it is said before anything is built."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt|not empty|not an empty"):
        compare(tmp_path / "out")
    with pytest.raises(OptionError, match="no data to score on"):
        compare(tmp_path / "new", data=None)
    with pytest.raises(OptionError, match="--search-evaluations is 4"):
        compare(tmp_path / "new", max_drop=1.0, search_evaluations=4)
    with pytest.raises(OptionError, match="no budget to keep"):
        compare(tmp_path / "new", search_minutes=1.0)
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        compare(tmp_path / "new", precision_plan=tmp_path / "plan.json")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_some(compare: Any, compared: Any, tmp_path: Path) -> None:
    """Float32 and what is asked for; a plan needs no search, and no budget of the user's."""
    plan = compared.path / "auto" / "precision.json"
    found = compare(tmp_path / "out", precisions=["auto"], precision_plan=plan)
    exact, auto = found.rows
    assert (exact.precision, auto.precision) == ("fp32", "auto")
    wanted = next(row for row in compared.rows if row.precision == "auto")
    assert (auto.drop, auto.weight_bytes) == (wanted.drop, wanted.weight_bytes)
    assert auto.note is None  # nothing was chosen here


def test_killed_half_way(compare: Any, tmp_path: Path) -> None:
    """Nothing is published, and no draft is left."""

    def killed(event: Any) -> None:
        if event == "precision int8":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "out", progress=killed)
    assert list(tmp_path.iterdir()) == []


def test_command(
    cli: Callable[..., Any], small_native: Any, small_rows: Any, tmp_path: Path
) -> None:
    """The table is printed; of what lacks calibration text or a budget, that is said."""
    result = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "score",
        "--precision", "all", "--data", small_rows.values, "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    printed = result.stdout + result.stderr
    for name in EVERY:
        assert name in printed
    assert "comparison.svg" in printed
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    refused = {row["precision"]: row["refused"] for row in rows}
    assert "was given no text" in refused["int8-static"]
    assert "has no budget to keep" in refused["auto"]
    assert "No auto: --precision auto has no budget to keep" in printed
