"""EPT on a DeBERTa base, end to end: the gate is the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eptc
from eptc.nn import EptConfig, EptModel, load_base
from eptc.tasks import Task


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A native checkpoint of two tasks on a bare DeBERTa of four blocks, one of them repeated."""
    from transformers import DebertaV2Config, DebertaV2Model

    shape = DebertaV2Config(
        vocab_size=50,
        hidden_size=36,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=50,
        max_position_embeddings=40,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_buckets=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DebertaV2Model(shape).save_pretrained(tmp_path / "base")
        model = EptModel.attach(
            load_base(tmp_path / "base", allow_missing=("pooler",)),
            EptConfig(
                variant="paper",
                targets=("query_proj", "value_proj", "intermediate.dense"),
                kernel_sizes=(2, 3, 4),
                top_k=2,
                rank=3,
                tasks=(
                    Task("tone", "classification", labels=("bad", "good", "neither")),
                    Task("score", "regression"),
                ),
            ),
            head_modules=("pooler",),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save(tmp_path / "ckpt", base_dir=tmp_path / "base", base_name="small-deberta")
    return tmp_path / "ckpt"


@pytest.mark.parametrize(("task", "width"), [("tone", 3), ("score", 1)])
def test_native_checkpoint(checkpoint: Path, task: str, width: int) -> None:
    base, out = checkpoint.parent / "base", checkpoint.parent / "out"
    bundle = eptc.export(checkpoint, base=base, task=task, out=out)
    assert bundle.manifest.parity["passed"]
    feeds: Any = {"input_ids": np.array([[1, 7, 9]]), "attention_mask": np.ones((1, 3), np.int64)}
    with eptc.Engine.load(out, providers=["cpu"]) as engine:
        assert engine.run(feeds)["logits"].shape == (1, width)
