"""Native checkpoints as LoRAs, on every kind of base, with ranks that are whole or cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import eptc
from eptc.nn import EptModel
from tests.lora_target.conftest import (
    BASES,
    CONFIG,
    PEFT_WARNINGS,
    PROVENANCE,
    WEIGHTS,
    agree,
    answers,
    ask,
    load,
    shape,
    t5,
)

pytestmark = PEFT_WARNINGS


def _zero(model: EptModel, path: str) -> None:
    model.layers[path].parts()["B"].data.zero_()


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("kind", BASES)
def test_peft_answers_like_the_unfolded_model(
    native: Any, tmp_path: Path, kind: str, variant: Any
) -> None:
    """Heads of its own included, on a base that has none; merged, too."""
    ckpt, base = native(kind, variant)
    folder = eptc.export(ckpt, base=base, target="lora", task="topic", out=tmp_path / "out")
    options = {"num_labels": 3} if kind not in ("t5", "llama") else {}
    model = peft.PeftModel.from_pretrained(load(base, **options), folder.path).eval()
    want = answers(ckpt, base, "topic")
    assert np.abs(want).max() > 0.1
    agree(ask(model), want)
    agree(ask(model.merge_and_unload()), want)
    assert folder.parity["topic"]["mode"] == "whole model"


def test_tasks_with_heads_switch_on_one_base(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    out = tmp_path / "out"
    eptc.export(ckpt, base=base, target="lora", task=["topic", "mood"], out=out)
    assert sorted(path.name for path in out.iterdir()) == [PROVENANCE, "tone", "topic"]
    model = peft.PeftModel.from_pretrained(load(base, num_labels=3), out / "tone", "tone")
    model.load_adapter(out / "topic", adapter_name="topic")
    for task in ("topic", "tone", "topic"):
        model.set_adapter(task)
        agree(ask(model.eval()), answers(ckpt, base, task))


def test_every_linear_has_one_rank(native: Any, tmp_path: Path) -> None:
    """Kernels of other sizes have other ranks: zeros fill what is less, and nothing is scaled."""
    ckpt, base = native("bert")
    folder = eptc.export(ckpt, base=base, target="lora", task="score", out=tmp_path / "out")
    config = json.loads((folder.path / CONFIG).read_text())
    tensors = safetensors.numpy.load_file(folder.path / WEIGHTS)
    ranks = {len(t) for name, t in tensors.items() if "lora_A" in name}
    assert ranks == {config["r"]} == {config["lora_alpha"]} == {folder.details["score"]["rank"]}
    assert len(folder.details["score"]["ranks"]) > 1
    # By its last name where every linear of that name is adapted: the pooler's `dense` is not.
    assert [name for name in config["target_modules"] if "." not in name] == ["query", "value"]
    assert len(config["target_modules"]) == 2 + 2 * 3
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]


def test_an_expert_that_says_nothing_is_no_rank(native: Any, tmp_path: Path) -> None:
    def silence(model: EptModel) -> None:
        _zero(model, "bert.encoder.layer.0.attention.self.query")

    ckpt, base = native("bert", "paper", silence)
    folder = eptc.export(ckpt, base=base, target="lora", task="tone", out=tmp_path / "out")
    assert folder.details["tone"]["ranks"]["0"] == 1
    model = peft.PeftModel.from_pretrained(load(base, num_labels=3), folder.path).eval()
    agree(ask(model), answers(ckpt, base, "tone"))


def test_an_adapter_that_says_nothing_is_the_base(native: Any, tmp_path: Path) -> None:
    def silence(model: EptModel) -> None:
        for path in model.layers:
            _zero(model, path)

    ckpt, base = native("llama", "released", silence)
    folder = eptc.export(ckpt, base=base, target="lora", task="tone", out=tmp_path / "out")
    assert folder.details["tone"]["rank"] == 0
    want = ask(load(base))
    model = peft.PeftModel.from_pretrained(load(base), folder.path).eval()
    np.testing.assert_array_equal(ask(model), want)


def test_a_lora_is_written_with_the_factor_in_it(tmp_path: Path) -> None:
    """A rank-stabilised one with an alpha of its own comes out as a plain LoRA."""
    torch.manual_seed(0)
    model = t5().eval()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=9, use_rslora=True, target_modules=["q", "wo"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    want = ask(adapted)
    adapted.save_pretrained(str(tmp_path / "ckpt"))
    folder = eptc.export(
        tmp_path / "ckpt", base=tmp_path / "base", target="lora", out=tmp_path / "out"
    )
    found = peft.PeftModel.from_pretrained(load(tmp_path / "base"), folder.path).eval()
    agree(ask(found), want)


@pytest.mark.parametrize("max_rank", [None, 1])
def test_what_is_adapted_of_a_head_is_folded_into_it(tmp_path: Path, max_rank: int | None) -> None:
    """PEFT adapts nothing inside of a classification head, and replaces it whole."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**shape(num_labels=3))
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    ).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            # Of the query there is rank 1: a cut leaves it as it is.
            parameter.data += 0.2 * torch.randn(parameter.shape)
            if "query.lora_A" in name:
                parameter.data[1] = parameter.data[0]
    want = ask(adapted)
    adapted.save_pretrained(str(tmp_path / "ckpt"))
    folder = eptc.export(
        tmp_path / "ckpt", base=tmp_path / "base", target="lora", out=tmp_path / "out",
        max_rank=max_rank,
    )  # fmt: skip
    assert folder.details["default"]["rank"] == 1  # the head's is no rank of the adapter
    found = peft.PeftModel.from_pretrained(load(tmp_path / "base"), folder.path).eval()
    agree(ask(found), want)


def test_a_cut_rank_loses_what_it_says(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    exact, cut = (
        eptc.export(
            ckpt, base=base, target="lora", task="tone", out=tmp_path / f"{rank}", max_rank=rank
        )
        for rank in (None, 2)
    )
    details, parity = cut.details["tone"], cut.parity["tone"]
    assert (details["rank"], details["lost"]["max_rank"]) == (2, 2)
    tensors = [safetensors.numpy.load_file(f.path / WEIGHTS) for f in (exact, cut)]
    lost = []
    for name in tensors[0]:
        if "lora_A" in name:
            whole, kept = (t[name.replace("_A", "_B")] @ t[name] for t in tensors)
            left_out = np.linalg.svd(whole.astype(np.float64), compute_uv=False)[2:]
            lost.append(np.linalg.norm(left_out) / np.linalg.norm(whole))
            assert np.linalg.norm(whole - kept) / np.linalg.norm(whole) == pytest.approx(
                lost[-1], rel=1e-4
            )
    for found in (details["lost"]["worst"], parity["lost_worst"]):
        assert found == pytest.approx(max(lost), rel=0.06)  # two digits
    for found in (details["lost"]["mean"], parity["lost_mean"]):
        assert found == pytest.approx(np.mean(lost), rel=0.06)
    assert parity["largest_error"] > 1e-3 > exact.parity["tone"]["largest_error"]
    assert [record.name for record in cut.passes][-1] == "truncate-rank"


def test_a_rank_that_is_large_enough_loses_nothing(native: Any, tmp_path: Path) -> None:
    ckpt, base = native("llama")
    folder = eptc.export(
        ckpt, base=base, target="lora", task="tone", out=tmp_path / "out", max_rank=64
    )
    assert folder.details["tone"]["lost"]["worst"] == 0.0
    model = peft.PeftModel.from_pretrained(load(base), folder.path).eval()
    agree(ask(model), answers(ckpt, base, "tone"))
