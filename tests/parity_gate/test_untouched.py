"""Sound checkpoints pass: every task of every recorded set, and every form of a native one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eptc.nn import GateConfig, ModuleConfig, ScaleConfig

SETS = ("t5-tiny", "t5-gated-tiny", "llama-tiny")

NATIVE: dict[str, dict[str, Any]] = {
    "per linear": {},
    "shared": {"sharing": "model"},
    "d/T": {
        "scale": ScaleConfig("d/T", denominator=3),
        "gate": GateConfig(temperature=0.5, normalization="none"),
    },
    "one expert": {"top_k": 1, "gate": GateConfig(temperature=0.05)},
    "every expert": {"top_k": 4, "gate": GateConfig(temperature=1.0, normalization="softmax")},
    "linears of their own": {
        "modules": {"bert.encoder.layer.0.attention.self.query": ModuleConfig(alpha=5.0, rank=2)}
    },
    "released": {
        "variant": "released",
        "gate": GateConfig("task", 1.0, "softmax"),
        "kernel_sizes": (2, 2, 3, 5, 7, 34, 40, 60),
    },
}


def check(out: Path) -> None:
    parity = json.loads((out / "parity.json").read_text())
    summary = parity["summary"]
    assert summary["verified"]
    assert summary["passed"]
    assert summary["flips"] == 0
    assert summary["decisions"] >= 32
    assert summary["text_probes"] >= 5
    assert summary["synthetic_probes"] >= 6
    assert parity["texts_tokenized_equally"] >= 20
    # Far from the bound: a sound build must not depend on luck.
    assert max(t["error"] / t["bound"] for t in parity["tensors"]) < 0.5
    assert max(parity["layers"].values()) < 0.5
    assert parity["weights"] < 0.5
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["parity"] == summary
    assert str(out) not in json.dumps(parity)


@pytest.mark.parametrize("task", range(8))
@pytest.mark.parametrize("name", SETS)
def test_recorded(recorded: Any, tmp_path: Path, name: str, task: int) -> None:
    recorded(name).export(tmp_path / "out", task)
    check(tmp_path / "out")


def test_one_expert_of_released_code(recorded: Any, tmp_path: Path) -> None:
    recorded("t5-topk1").export(tmp_path / "out", "rte")
    check(tmp_path / "out")


@pytest.mark.parametrize("what", NATIVE)
def test_native(paper: Any, tmp_path: Path, what: str) -> None:
    number = list(NATIVE).index(what)
    paper(**NATIVE[what]).export(tmp_path / "out", ("tone", "same", "care")[number % 3])
    check(tmp_path / "out")


def test_same_report_twice(paper: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        paper().export(tmp_path / name, "tone")
    a, b = ((tmp_path / name / "parity.json").read_bytes() for name in ("a", "b"))
    assert a == b


def test_without_the_gate_the_manifest_says_so(paper: Any, tmp_path: Path) -> None:
    bundle = paper().export(tmp_path / "out", "tone", verify=False)
    assert bundle.manifest.parity == {"verified": False}
    assert not (tmp_path / "out" / "parity.json").exists()
