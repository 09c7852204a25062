"""Models that carry rounding far pass the gate; what rounding does not explain never does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eptc
from eptc.parity_gate.compare import FP32
from eptc.parity_gate.sensitivity import compare_beside_rounding, disturbed, widened

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")


def test_rounding_is_disturbed_and_put_back() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    x = torch.randn(4, 5)
    with torch.no_grad():
        before = model(x)
        with disturbed(model):
            first = model(x)
        with disturbed(model):
            second = model(x)
        after = model(x)
    assert 0 < (first - before).abs().max() < 1e-6
    assert torch.equal(first, second)
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("moved", "relative"),
    [(0.0, 3e-5), (7e-6, 3e-5), (5e-5, 2e-4), (1e-2, 5e-4), (float("nan"), 3e-5)],
)
def test_bounds_follow_what_rounding_moves(moved: float, relative: float) -> None:
    """Four times that; never less than the usual bound, never as much as a fault."""
    want = np.array([[1.0, -20.0, 3.0]], np.float32)
    nudged = want.astype(np.float64) + np.array([[20 * moved, 0.0, 0.0]])
    found = widened(FP32, want, nudged, None)
    assert found.relative == pytest.approx(relative, rel=1e-6)


def test_padding_does_not_widen() -> None:
    want = np.ones((1, 2, 3), np.float32)
    nudged = want.copy()
    nudged[0, 1] += 0.5
    assert widened(FP32, want, nudged, np.array([[True, False]])) == FP32


@pytest.mark.parametrize("off", [1e-4, 2e-3])
def test_an_ordinary_model_is_allowed_no_more(off: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    x = torch.randn(4, 5)
    with torch.no_grad():
        want = model(x).numpy()
        found, bound = compare_beside_rounding(
            "logits", want + np.float32(off), want, FP32,
            model=model, again=lambda: model(x).numpy(),
        )  # fmt: skip
    assert not found.passed
    assert bound == FP32


@pytest.mark.parametrize(("off", "passes"), [(1e-4, True), (2e-3, False)])
def test_a_model_that_carries_rounding_far_is_allowed_that(off: float, passes: bool) -> None:
    """What is off by more keeps the usual bound in what is reported."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7)
    x = torch.randn(4, 5)

    def answer() -> Any:
        return torch.sin(2000 * model(x)).numpy()

    with torch.no_grad():
        want = answer()
        found, bound = compare_beside_rounding(
            "logits", want + np.float32(off), want, FP32, model=model, again=answer
        )
    assert found.passed == passes
    assert (bound.relative > FP32.relative) == passes
    assert bool(found.why) == passes


@pytest.fixture
def sharp(copy_golden: Callable[..., Any]) -> Any:
    """A T5 whose attention is nearly a choice: float32's last digits are carried far."""
    folders = copy_golden("t5-gated-tiny")
    weights = load_file(folders.base / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("Attention.q.weight"):
            tensor *= 15
    save_file(weights, folders.base / "model.safetensors", metadata={"format": "pt"})
    return folders


@pytest.mark.parametrize("target", ["onnx", "hf", "lora"])
def test_attention_that_is_nearly_a_choice_passes(sharp: Any, target: str) -> None:
    """The usual bound is too narrow there, for every target."""
    made = eptc.export(
        sharp.ckpt, base=sharp.base, task="sst2", out=sharp.out, top_k=2, tasks=TASKS,
        target=target,
    )  # fmt: skip
    if target == "onnx":
        parity = made.manifest.parity
        assert parity["passed"]
        assert parity["flips"] == 0
        said = json.loads((sharp.out / "parity.json").read_text())["tensors"]
        assert any("moves the reference itself" in tensor.get("why", "") for tensor in said)
