"""Results as JSON and back, as text, and as a figure."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.report import best_exporter, report
from benchmarks.results import (
    Build,
    CaseResult,
    Conditions,
    Machine,
    Measure,
    Ratio,
    Results,
    Timing,
)

CONDITIONS = Conditions(
    "0123456789ab", Machine("a CPU", 2, 2**34, "Linux x86_64", "3.11.7"), 2, 7, False,
    {"eptc": {"numpy": "2.0"}},
)  # fmt: skip


def timing(name: str, family: str, ratio: float | None) -> Timing:
    """Return a contestant that ran, or with a ratio of None one that did not."""
    if ratio is None:
        return Timing(name, f"the {name}", family, "failed", "export: no\nway")
    interval = Ratio(ratio, ratio * 0.9, ratio * 1.1, 6)
    return Timing(
        name, f"the {name}", family, "measured", None, (0.002,) * 6, (0.002 * ratio,) * 6,
        interval, 1e-6, 2**27,
    )  # fmt: skip


@pytest.fixture
def found() -> list[Results]:
    engine = dataclasses.replace(timing("eptc", "engine", 1.0), ratio=None)
    case = CaseResult(
        "minilm-b1-s32", "minilm", "classify", 1, 32, 0, 6, 3,
        (
            engine, timing("base", "base", 1.0), timing("slow", "exporter", 0.5),
            timing("fast", "exporter", 0.8), timing("gone", "exporter", None),
        ),
        0.01, None,
    )  # fmt: skip
    build = Build(
        "t5-base-build", "t5-base",
        (
            Measure("cold", "measured", None, (50.0,), (2**30,), (2**31,), 2000),
            Measure("optimum", "failed", "exit code 1"),
        ),
        {"second / cold, seconds": Ratio(0.1, None, None, 1)}, 1000, 0.5,
    )  # fmt: skip
    return [
        Results(case.name, CONDITIONS, case=case),
        Results(build.name, CONDITIONS, build=build),
    ]


def test_json_and_back(found: list[Results], tmp_path: Path) -> None:
    for one in found:
        path = tmp_path / f"{one.name}.json"
        results.write(one, path)
        assert results.read(path) == one
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema_version",), 99, "schema version 99"),
        (("extra",), 1, "not an object"),
        (("conditions", "threads"), "two", "conditions.threads is 'two'"),
        (("case", "timings", 0, "status"), "perhaps", r"timings\[0\].status is 'perhaps'"),
        (("case", "timings", 1, "seconds", 2), None, r"seconds\[2\] is None"),
        (("case", "timings", 1, "ratio", "low"), "0.9", "ratio.low is '0.9'"),
        (("case",), [], "not an object"),
    ],
)
def test_other_json_is_refused(
    found: list[Results], tmp_path: Path, path: tuple[Any, ...], value: Any, said: str
) -> None:
    file = tmp_path / "a.json"
    results.write(found[0], file)
    data = json.loads(file.read_text())
    *parents, last = path
    place = data
    for key in parents:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        results.read(file)


def test_the_report_drops_nothing(found: list[Results]) -> None:
    text = report(found)
    for said in (
        "a CPU, 2 threads of 2 CPUs", "commit 0123456789ab", "numpy 2.0",
        "| minilm-b1-s32 | the fast | 0.800 | 0.720 to 0.880 |",
        "| the slow | 2.00 | 1.00 | 0.500 | 0.450 to 0.550 | 2.00x | 1.0e-06 | 128 MiB |",
        "the gone did not run: export: no way",
        "others used an unknown share of the machine, waiting contestants 1% of a CPU",
        "| cold | 50.0 | 1.00 GiB | 2.00 GiB | 0 MiB | 2.000 |",
        "optimum did not run: exit code 1",
        "second / cold, seconds: 0.100, rounds: 1",
    ):  # fmt: skip
        assert said in text


def test_the_best_exporter_is_the_one_closest_to_the_engine(found: list[Results]) -> None:
    case = found[0].case
    assert case is not None
    best = best_exporter(case)
    assert best is not None
    assert best.contestant == "fast"
    alone = dataclasses.replace(case, timings=case.timings[:2])
    assert best_exporter(alone) is None


def test_the_same_results_draw_the_same_bytes(found: list[Results], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, which `make bench` installs")
    from benchmarks.figure import draw

    draw(found, tmp_path / "a.svg")
    draw(found, tmp_path / "b.svg")
    one = (tmp_path / "a.svg").read_bytes()
    assert one == (tmp_path / "b.svg").read_bytes()
    text = one.decode()
    assert "the slow" in text
    assert "the gone" not in text
    assert ">2.00<" in text
    assert "<dc:date>" not in text
