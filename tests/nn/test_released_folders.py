"""The authors' folders: what their options mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eptc.nn import (
    EptConfig,
    EptModel,
    ModuleConfig,
    ScaleConfig,
    load_reference,
)
from eptc.tasks import GLUE, Task

MakeBase = Callable[..., Path]
Trained = Callable[..., EptModel]
WriteReleased = Callable[..., Path]

NAMES = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.self_attn.q_proj"


def logits(model: EptModel, task: str) -> Tensor:
    ids = torch.arange(3, 21).reshape(2, 9)
    extra = {"decoder_input_ids": ids[:, :3]} if model.hf.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(task=task, input_ids=ids, **extra).logits
    return found


# Options of the adapter's configuration, and the ranks and scales they mean.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    "plain": ({}, {}, {DOWN: 4, UP: 4}),
    "rslora": ({}, {"scale": ScaleConfig("alpha/sqrt(r)", alpha=16)}, {DOWN: 8, UP: 8}),
    "rank pattern": (
        {"rank_pattern": {"down_proj": 8}},
        {"modules": {f"model.layers.{i}.mlp.down_proj": ModuleConfig(rank=8) for i in (0, 1)}},
        {DOWN: 2, UP: 4},
    ),
    "pattern of one module": (
        {"rank_pattern": {UP: 2}, "alpha_pattern": {UP: 10}},
        {"modules": {UP: ModuleConfig(rank=2, alpha=10)}},
        {DOWN: 4, UP: 5},
    ),
    "pattern with an expression": (
        {"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 2}},
        {"modules": {f"model.layers.{i}.self_attn.q_proj": ModuleConfig(alpha=2) for i in (0, 1)}},
        {DOWN: 4, UP: 0.5},
    ),
    # PEFT looks one key up in both patterns: the first that fits, ranks before alphas.
    "the first pattern wins": (
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"self_attn.q_proj": 2}},
        {},
        {DOWN: 4, UP: 4},
    ),
    "targets as an expression": (
        {"target_modules": r".*\.(q|down)_proj"},
        {},
        {DOWN: 4, UP: 4},
    ),
    "a target the base has not": (
        {"target_modules": ["q_proj", "down_proj", "wi"]},
        {},
        {DOWN: 4, UP: 4},
    ),
}


@pytest.mark.parametrize(("options", "changes", "scales"), OPTIONS.values(), ids=OPTIONS)
def test_released_options(
    make_base: MakeBase,
    tmp_path: Path,
    options: dict[str, Any],
    changes: dict[str, Any],
    scales: dict[str, float],
    trained: Trained,
    write_released: WriteReleased,
    released: EptConfig,
) -> None:
    base = make_base("llama")
    model = trained(base, dataclasses.replace(released, **changes))
    folder = write_released(model, tmp_path / "adapter", **options)
    loaded = load_reference(folder, base, top_k=2, tasks=NAMES)
    for path, scale in scales.items():
        assert loaded.layers[path].scaling == scale
    assert torch.equal(logits(loaded, "rte"), logits(model, "rte"))


def test_released_tasks_and_top_k(
    make_base: MakeBase,
    tmp_path: Path,
    trained: Trained,
    write_released: WriteReleased,
    released: EptConfig,
) -> None:
    """Fewer tasks than rows are fine; published names bring their prompts; top_k is clamped."""
    base = make_base("llama")
    folder = write_released(trained(base, released), tmp_path / "adapter")
    mine = Task("mine", "generation")
    loaded = load_reference(folder, base, top_k=99, tasks=["sst2", mine])
    assert loaded.tasks == (GLUE["sst2"], mine)
    assert loaded.config.top_k == 8
    assert loaded.layers[UP].task_embedding.shape == (8, 32)
