"""Searching a precision for each weight: within a budget, resumable, the same every time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

import eptc
from eptc.errors import ParityError
from eptc.runtime import Engine

BUDGET = 1.0  # points of the correlation: more than int8 loses, less than int4 does
SAME = ("weights.bin", "model.onnx")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own: no search is known."""
    monkeypatch.setenv("EPTC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "search"


@pytest.fixture(scope="module")
def build(small_native: Any, small_rows: Any) -> Callable[..., eptc.Bundle]:
    """Return a function that compiles the small checkpoint's regression with `auto`."""

    def run(out: Path, **options: Any) -> eptc.Bundle:
        given = {
            "ckpt": small_native.ckpt, "data": small_rows.values, "max_drop": BUDGET, **options,
        }  # fmt: skip
        built: eptc.Bundle = eptc.export(
            base=small_native.base, task="score", out=out, precision="auto", **given
        )
        return built

    return run


@pytest.fixture(scope="module")
def found(build: Any, tmp_path_factory: pytest.TempPathFactory) -> eptc.Bundle:
    """What a search with the usual settings finds."""
    bundle: eptc.Bundle = build(tmp_path_factory.mktemp("found") / "out")
    return bundle


def plan_of(bundle: eptc.Bundle) -> Any:
    return json.loads((bundle.path / "precision.json").read_text("utf-8"))


def bytes_of(bundle: eptc.Bundle) -> list[str]:
    return [hashlib.sha256((bundle.path / name).read_bytes()).hexdigest() for name in SAME]


def test_plan_keeps_the_budget(found: eptc.Bundle, build: Any, tmp_path: Path) -> None:
    """It mixes levels, keeps the budget, and is smaller than one level for all that does."""
    plan, record = plan_of(found), plan_of(found)["search"]
    levels = set(plan["weights"].values())
    assert {"int8", "int4"} <= levels
    assert found.manifest.precision == "mixed"
    assert found.manifest.parity["passed"]
    assert found.manifest.parity["exact"]["passed"]
    scores = found.manifest.parity["scores"]
    assert 0 < scores["drop"] <= BUDGET / 100
    assert scores == record["scores"] | {
        "claimed": False, "chosen_on_these_rows": True,
        "budget": {"max_drop": BUDGET, "max_flips": None},
    }  # fmt: skip
    assert record["stopped"] is None
    assert record["groups"] == "single weights"
    assert record["searched_weight_bytes"] < 0.35 * record["searched_weight_bytes_exact"]
    # The plan's own weights in float32, and those that can be nothing else.
    stays = plan["stays_float32"]
    assert stays["bert.pooler.dense.bias"] == "it is no matrix"
    assert "decides" in stays["classifier.weight"]
    single = {name for name, level in plan["weights"].items() if level == "fp32"}
    assert {n for n in stays if n in plan["weights"]} == single
    # What the plan was said to take is what is stored: numbers, scales and zero points.
    choices = [name for name in plan["weights"] if name != "classifier.weight"]
    stored = onnx_ir.load(found.path / "model.onnx").graph.initializers
    assert record["searched_weight_bytes"] == sum(
        value.const_value.nbytes
        for name, value in stored.items()
        if name.partition("@")[0] in choices and value.const_value is not None
    )
    # A tighter budget costs bytes.
    tight = build(tmp_path / "tight", max_drop=0.05)
    assert tight.manifest.parity["scores"]["drop"] <= 0.0005
    assert plan_of(tight)["search"]["searched_weight_bytes"] > record["searched_weight_bytes"]


def test_same_plan_again(found: eptc.Bundle, build: Any, cache: Path, tmp_path: Path) -> None:
    """Found again from nothing, to the byte; and again with everything known."""
    for name in ("again", "known"):
        other = build(tmp_path / name)
        assert plan_of(other) == plan_of(found)
        assert bytes_of(other) == bytes_of(found)
    [kept] = cache.iterdir()
    assert kept.stat().st_size > 0


def test_plan_passed_back(found: eptc.Bundle, build: Any, tmp_path: Path) -> None:
    """As it was written it gives the same engine, without data; what was edited is followed."""
    path = found.path / "precision.json"
    back = build(tmp_path / "back", precision_plan=path, data=None, max_drop=None)
    assert bytes_of(back) == bytes_of(found)
    assert plan_of(back)["weights"] == plan_of(found)["weights"]
    assert "search" not in plan_of(back)

    weights = dict(plan_of(found)["weights"])
    key, value = (f"bert.encoder.layer.0.attention.self.{x}.weight" for x in ("key", "value"))
    weights |= {key: "fp32", value: "int4"}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps({"schema_version": 1, "weights": weights}))
    bundle = build(tmp_path / "edited", precision_plan=edited, data=None, max_drop=None)
    assert plan_of(bundle)["weights"] == weights
    stored = onnx_ir.load(bundle.path / "model.onnx").graph.initializers
    assert stored[key].dtype == onnx_ir.DataType.FLOAT
    assert plan_of(bundle)["stays_float32"][key] == "the plan stores it as float32"
    assert stored[value].dtype == onnx_ir.DataType.UINT8
    assert bundle.manifest.parity["passed"]


def test_plan_over_the_budget(found: eptc.Bundle, build: Any, tmp_path: Path) -> None:
    """A plan of the user's is judged like any other engine."""
    weights = plan_of(found)["weights"]
    lowest = {name: "int4" if level == "int8" else level for name, level in weights.items()}
    lowest["bert.pooler.dense.weight"] = weights["bert.pooler.dense.weight"]  # it has no int4
    path = tmp_path / "lowest.json"
    path.write_text(json.dumps({"schema_version": 1, "weights": lowest}))
    with pytest.raises(ParityError, match="auto: the pearson drops by"):
        build(tmp_path / "out", precision_plan=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cache")
def test_resumed(
    found: eptc.Bundle, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that was killed goes on where it was: no plan is evaluated twice."""
    loaded: list[str] = []
    sound = Engine.load

    def load(path: Any, **options: Any) -> Engine:
        if Path(path).name == "trial":
            loaded.append(hashlib.sha256((Path(path) / "model.onnx").read_bytes()).hexdigest())
        return sound(path, **options)

    monkeypatch.setattr("eptc.trials.Engine.load", load)

    def killed(event: Any) -> None:
        if str(event).startswith("search: evaluation 9 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", progress=killed)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert len(loaded) == 8
    resumed = build(tmp_path / "out")
    assert plan_of(resumed) == plan_of(found)
    assert bytes_of(resumed) == bytes_of(found)
    assert len(loaded) == plan_of(resumed)["search"]["evaluations"]


@pytest.mark.parametrize("what", ["data", "method", "task", "budget"])
def test_nothing_is_taken_from_another_search(
    build: Any, copy_native: Any, small_rows: Any, cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, what: str,
) -> None:  # fmt: skip
    """With another input, what an earlier search found changes nothing."""
    options: dict[str, Any] = {}
    if what == "data":
        options["data"] = tmp_path / "other.jsonl"
        rows = [json.loads(line) for line in small_rows.values.read_text().splitlines()]
        options["data"].write_text("".join(json.dumps(row) + "\n" for row in rows[:60] * 2))
    elif what == "method":
        options["block_method"] = "k-quant"
    elif what == "budget":
        options["max_drop"] = 0.2
    else:
        config = copy_native.ckpt / "ept_config.json"
        told = json.loads(config.read_text())
        [score] = [task for task in told["tasks"] if task["name"] == "score"]
        score["max_length"] = 6
        config.write_text(json.dumps(told))
        options["ckpt"] = copy_native.ckpt
    build(tmp_path / "earlier")
    known = [path.name for path in cache.iterdir()]
    other = build(tmp_path / "other", **options)
    monkeypatch.setenv("EPTC_CACHE_DIR", "")
    fresh = build(tmp_path / "fresh", **options)
    assert plan_of(other) == plan_of(fresh)
    assert bytes_of(other) == bytes_of(fresh)
    # A budget is no part of what is remembered: what plans cost is the same under any.
    assert (sorted(path.name for path in cache.iterdir()) == sorted(known)) is (what == "budget")


@pytest.mark.usefixtures("cache")
def test_damaged_memory(found: eptc.Bundle, build: Any, cache: Path, tmp_path: Path) -> None:
    """Half a line, as a kill leaves it, costs that evaluation and nothing else."""
    build(tmp_path / "first")
    [path] = cache.iterdir()
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]) + lines[5][:20])
    assert plan_of(build(tmp_path / "out")) == plan_of(found)


@pytest.mark.usefixtures("cache")
def test_time_is_up(build: Any, tmp_path: Path) -> None:
    """Before anything was tried on all rows there is no plan, and the reason is said."""
    with pytest.raises(ParityError, match=r"no plan was found .*the time was up") as raised:
        build(tmp_path / "out", search_minutes=1e-9)
    assert raised.value.exit_code == 1
    assert "--search-minutes" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_stopped_early(
    found: eptc.Bundle, build: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best plan so far is taken, and that the time was up is recorded."""
    del cache
    evaluations = plan_of(found)["search"]["evaluations"]
    start = time.monotonic()
    now = [start]
    monkeypatch.setattr("eptc.trials.time.monotonic", lambda: now[0])

    def late(event: Any) -> None:
        if str(event).startswith(f"search: evaluation {evaluations - 1} "):
            now[0] = start + 120

    bundle = build(tmp_path / "out", search_minutes=1.0, progress=late)
    record = plan_of(bundle)["search"]
    assert record["stopped"] == "the time was up"
    assert record["minutes_allowed"] == 1.0
    assert record["evaluations"] == evaluations - 1
    assert bundle.manifest.parity["scores"]["drop"] <= BUDGET / 100


def test_no_plan_fits(
    small_native: Any, small_rows: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Exit code 1, the closest miss, what to do; nothing is published."""
    result = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "score",
        "--precision", "auto", "--data", small_rows.values, "--max-drop", "0",
        "--search-evaluations", "5", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 1, result
    for words in ("no plan was found", "the pearson drops by", "--max-drop"):
        assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("evaluations", "groups"),
    [(100, "single weights"), (20, "blocks"), (5, "all weights together")],
)
def test_fewer_evaluations_make_coarser_groups(
    build: Any, tmp_path: Path, evaluations: int, groups: str
) -> None:
    """A block's weights then go down together, and the evaluations are enough."""
    bundle = build(tmp_path / "out", search_evaluations=evaluations)
    plan = plan_of(bundle)
    assert plan["search"]["groups"] == groups
    assert plan["search"]["evaluations"] <= evaluations
    block = {level for name, level in plan["weights"].items() if ".layer.0." in name}
    assert (len(block) > 1) is (groups == "single weights")
