"""The gate of `--target lora`: what is off is never published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc.errors import (
    ParityError,
)
from tests.lora_target.conftest import (
    PEFT_WARNINGS,
    PROVENANCE,
    contents,
)

pytestmark = PEFT_WARNINGS


def swap(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """The factors of two linears of one shape change places."""
    one, other = (f"base_model.model.bert.encoder.layer.{i}.attention.self.query" for i in (0, 1))
    for part in "AB":
        a, b = (f"{path}.lora_{part}.weight" for path in (one, other))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def transpose(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """A and B of a square linear change places."""
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    a, b = (f"{path}.lora_{part}.weight" for part in "AB")
    tensors[a], tensors[b] = tensors[b].T.copy(), tensors[a].T.copy()


def crop(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """The last input of a linear is not read."""
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_A.weight"
    tensors[name][:, -1] = 0


def forget(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Half of the ranks are not written."""
    for name in tensors:
        if "lora_" in name:
            half = config["r"] // 2
            tensors[name] = tensors[name][:half] if "_A" in name else tensors[name][:, :half]
    config["r"] = config["lora_alpha"] = config["r"] // 2


def poison(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    name = "base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"
    tensors[name][0, 0] = np.nan


def head(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    tensors["base_model.model.classifier.bias"] += 1e-3


def drop_head(tensors: dict[str, Any], _: dict[str, Any]) -> None:
    """The pooler is the base's."""
    for name in [name for name in tensors if "pooler" in name]:
        tensors[name] = tensors[name] * 0


def alpha(_: dict[str, Any], config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2


def target(_: dict[str, Any], config: dict[str, Any]) -> None:
    config["target_modules"] = config["target_modules"][1:]


def wide(_: dict[str, Any], config: dict[str, Any]) -> None:
    """PEFT would adapt a linear that has no factors."""
    config["target_modules"].append("key")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (swap, "what bert.encoder.layer.0.attention.self.query adds"),
        (transpose, "what bert.encoder.layer.0.attention.self.query adds"),
        (crop, "what bert.encoder.layer.1.output.dense adds"),
        (forget, "output tensors differ"),
        (poison, "does not load.*NaN"),
        (head, "classifier.bias is not the reference's"),
        (drop_head, "pooler.dense.* is not the reference's"),
        (alpha, "the factor 2"),
        (target, "target_modules and the tensors"),
        (wide, "target_modules and the tensors"),
    ],
)
@pytest.mark.parametrize("memory", [None, 1], ids=["whole", "by linear"])
def test_what_is_off_is_never_published(
    native: Any, spoil: Any, tmp_path: Path, fault: Any, words: str, memory: int | None
) -> None:
    ckpt, base = native("bert")
    spoil(fault)
    with pytest.raises(ParityError, match=words):
        eptc.export(
            ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", max_memory=memory
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("fault", [swap, transpose, crop, poison, head, alpha, target])
def test_a_cut_rank_is_no_excuse(native: Any, spoil: Any, tmp_path: Path, fault: Any) -> None:
    """What was asked for may be lost; garbage is not what was asked for."""
    ckpt, base = native("bert")
    spoil(fault)
    with pytest.raises(ParityError):
        eptc.export(ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", max_rank=4)
    assert not (tmp_path / "out").exists()


def test_linear_by_linear_where_memory_is_short(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("roberta")
    small, large = (
        eptc.export(
            ckpt, base=base, target="lora", task="tone", out=tmp_path / f"{memory}",
            max_memory=memory,
        )
        for memory in (1, None)
    )  # fmt: skip
    parity = small.parity["tone"]
    assert (parity["mode"], parity["passed"]) == ("linear by linear", True)
    assert parity["tensors"] == parity["linears"]
    found = [contents(folder.path) for folder in (small, large)]
    for each in found:
        del each[PROVENANCE]  # it says how it was compared
    assert found[0] == found[1]


def test_nobody_is_asked_without_verification(native: Any, spoil: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    spoil(alpha)
    folder = eptc.export(
        ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", verify=False
    )
    assert folder.parity == {"tone": {"verified": False}}
    assert json.loads((folder.path / PROVENANCE).read_text())["parity"] == {"verified": False}


def test_the_gate_is_the_exit_code(native: Any, spoil: Any, cli: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    spoil(alpha)
    given = ("export", ckpt, "--base", base, "--target", "lora", "--task", "tone")
    assert cli(*given, "-o", tmp_path / "out").code == 1
    assert not (tmp_path / "out").exists()
