"""EPT on a DeBERTa base, end to end: the gate is the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eptc
from eptc.errors import CheckpointError
from eptc.nn import EptConfig, EptModel, load_base
from eptc.tasks import Task


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A native checkpoint of two tasks on a bare DeBERTa of four blocks, one of them repeated."""
    return _write(tmp_path, ("query_proj", "value_proj", "intermediate.dense"))


def _write(tmp_path: Path, targets: tuple[str, ...]) -> Path:
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
                targets=targets,
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


def test_positions_have_no_task(checkpoint: Path) -> None:
    """The query projection is also executed on relative positions, which are no row's own."""
    base, out = checkpoint.parent / "base", checkpoint.parent / "out"
    with pytest.raises(CheckpointError, match="query_proj reads no row of the batch"):
        eptc.export(checkpoint, base=base, task="all", out=out)
    assert not out.exists()


def test_several_tasks(tmp_path: Path) -> None:
    """Heads of two linears each, of different widths."""
    ckpt = _write(tmp_path, ("value_proj", "intermediate.dense"))
    bundle = eptc.export(ckpt, base=tmp_path / "base", task="all", out=tmp_path / "out")
    assert bundle.manifest.parity["mixed"]["passed"]
    feeds: Any = {
        "input_ids": np.array([[1, 7, 9]] * 2),
        "attention_mask": np.ones((2, 3), np.int64),
        "task_ids": np.array([1, 0]),
    }
    with eptc.Engine.load(tmp_path / "out", providers=["cpu"]) as engine:
        logits = engine.run(feeds)["logits"]
        del feeds["task_ids"]
        for row, task in enumerate(("score", "tone")):
            alone = engine.for_task(task).run(feeds)["logits"]
            np.testing.assert_array_equal(logits[row, : alone.shape[1]], alone[row])
