"""Models that carry rounding far pass the gate; what rounding does not explain never does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eptc
from eptc.parity_gate.compare import FP32
from eptc.parity_gate.sensitivity import disturbed, widened

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


def test_attention_that_is_nearly_a_choice_passes(copy_golden: Callable[..., Any]) -> None:
    """Large scores carry the last digits of float32 far: the usual bound is too narrow there."""
    folders = copy_golden("t5-gated-tiny")
    weights = load_file(folders.base / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("Attention.q.weight"):
            tensor *= 15
    save_file(weights, folders.base / "model.safetensors", metadata={"format": "pt"})
    bundle = eptc.export(
        folders.ckpt, base=folders.base, task="sst2", out=folders.out, top_k=2, tasks=TASKS,
    )  # fmt: skip
    parity = bundle.manifest.parity
    assert parity["passed"]
    assert parity["flips"] == 0
