"""Budgets on labels that flip: held when an engine is built, and when it is checked again."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import eptc
from eptc.errors import ParityError

ROWS = 200
BUDGET = 0.04  # of the labels: more than int8 flips where float32 is sure, less than int4 does


@pytest.fixture(scope="module")
def tone(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What compiles a classification that answers each of its labels to half of some texts.

    `data` are these texts, labelled with what float32 answers.
    """
    root = tmp_path_factory.mktemp("tone")
    ckpt = Path(shutil.copytree(small_native.ckpt, root / "ckpt"))
    drawn = random.Random(0)
    words = ("a", "and", "bad", "dull", "film", "good", "long", "not", "quiet", "the", "very")
    texts = [" ".join(drawn.choices(words, k=drawn.randint(1, 12))) for _ in range(ROWS)]

    def answers(out: Path) -> Any:
        eptc.export(ckpt, base=small_native.base, task="tone", out=out, verify=False)
        with eptc.Engine.load(out, providers=["cpu"]) as engine:
            return engine.classify(texts)

    odds = [np.log(a.probabilities[1] / a.probabilities[0]) for a in answers(root / "before")]
    weights = safetensors.torch.load_file(ckpt / "ept_model.safetensors")
    weights["heads.tone.classifier.bias"][1] -= float(np.median(odds))
    safetensors.torch.save_file(weights, ckpt / "ept_model.safetensors", metadata={"format": "pt"})
    data = root / "data.jsonl"
    labels = [answer.label for answer in answers(root / "after")]
    assert 0.4 < labels.count("good") / ROWS < 0.6
    data.write_text(
        "".join(
            json.dumps({"text": text, "label": label}) + "\n"
            for text, label in zip(texts, labels, strict=True)
        )
    )
    return {"ckpt": ckpt, "base": small_native.base, "task": "tone", "data": data}


def again(tone: dict[str, Any], bundle: Path, **changed: Any) -> Any:
    """Check a bundle again on labelled data; return the scores."""
    given = {"reference": tone["ckpt"], "base": tone["base"], "data": tone["data"], **changed}
    return eptc.parity(bundle, **given).scores


def test_flips_over_the_budget(
    tone: dict[str, Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Exit code 1, how many there are, what to do; nothing is published, an old bundle stays."""

    def export(precision: str, out: Path, *more: str) -> Any:
        return cli(
            "export", tone["ckpt"], "--base", tone["base"], "--task", "tone", "-o", out,
            "--precision", precision, "--data", tone["data"], "--max-flips", BUDGET, *more,
        )  # fmt: skip

    assert export("int8", tmp_path / "out").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    scores = json.loads(before["manifest.json"])["parity"]["scores"]
    assert 0 < scores["flips_beyond_noise"] <= BUDGET * ROWS
    for out, more in ((tmp_path / "new", ()), (tmp_path / "out", ("--force",))):
        refused = export("int4", out, *more)
        assert refused.code == 1, refused
        for words in ("int4: ", f"of {ROWS} labels change where the reference is sure", "4.00%"):
            assert words in refused.stderr
        assert "--max-flips" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_sure_means_the_same_later(tone: dict[str, Any], tmp_path: Path, precision: Any) -> None:
    """The record of a build and that of a later check are one, and so is the budget."""
    bundle = eptc.export(out=tmp_path / "out", precision=precision, max_flips=0.1, **tone)
    built = dict(bundle.manifest.parity["scores"])
    assert built.pop("budget") == {"max_drop": None, "max_flips": 0.1}
    assert 0 < built["flips_beyond_noise"] < built["flips"]
    assert again(tone, bundle.path) == built


def test_budget_that_was_recorded(tone: dict[str, Any], tmp_path: Path) -> None:
    """It holds on other rows; without one, what a build is allowed that is given none."""
    bundle = eptc.export(out=tmp_path / "out", precision="int4", max_drop=25.0, **tone)
    assert again(tone, bundle.path)["flips_beyond_noise"] > 0.01 * ROWS
    rows = [json.loads(line) for line in tone["data"].read_text().splitlines()]
    with bundle.load(providers=["cpu"]) as engine:
        got = [answer.label for answer in engine.classify([row["text"] for row in rows])]
    wrong = [row for row, label in zip(rows, got, strict=True) if row["label"] != label]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in [*wrong, *rows[:20]]))
    with pytest.raises(ParityError, match=r"the accuracy drops by .* allowed are 25"):
        again(tone, bundle.path, data=other)

    given = {name: value for name, value in tone.items() if name != "data"}
    unscored = eptc.export(out=tmp_path / "unscored", precision="int4", **given)
    with pytest.raises(ParityError, match=r"labels change where the reference is sure.* 1\.00%"):
        again(tone, unscored.path)


def test_compared_under_a_budget(tone: dict[str, Any], tmp_path: Path) -> None:
    """It goes to every precision: int8 keeps it, int4 and what is allowed by default do not."""
    pytest.importorskip("matplotlib")
    given = {"precisions": ["int8", "int4"], "max_flips": BUDGET, **tone}
    found = eptc.compare_precisions(given.pop("ckpt"), out=tmp_path / "out", **given)
    assert [row.precision for row in found.rows] == ["fp32", "int8", "int4"]
    int8, int4 = found.to_json()["rows"][1:]
    assert 0.01 * ROWS < int8["flips_beyond_noise"] <= BUDGET * ROWS
    assert "labels change where the reference is sure, allowed are 4.00%" in int4["refused"]
