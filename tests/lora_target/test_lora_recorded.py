"""The authors' own checkpoints as LoRAs, beside the outputs that were recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import eptc
from tests.lora_target.conftest import (
    PEFT_WARNINGS,
    load,
)

pytestmark = PEFT_WARNINGS

# Largest difference that the recorded logits allow; the gated T5's reach 39.
SETS = {"t5-tiny": 2e-5, "t5-topk1": 2e-5, "t5-gated-tiny": 5e-5, "llama-tiny": 2e-5}


@pytest.fixture(scope="module", params=SETS)
def recorded(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, eptc.Folder]:
    """A set, its folder, and every task of it as an adapter."""
    source = golden / "ept" / request.param
    meta = json.loads((source / "meta.json").read_text())
    folder = eptc.export(
        source / "adapter", base=source / "base", target="lora", task="all",
        tasks=meta["tasks"], top_k=meta["moe_top_k"], out=tmp_path_factory.mktemp("lora") / "out",
    )  # fmt: skip
    return request.param, source, folder


def original(model: Any, want: Any) -> tuple[Any, Any]:
    """Return a model's logits on recorded inputs, and the recorded ones, where they count."""
    given = {key: torch.from_numpy(want[key]) for key in ("input_ids", "attention_mask")}
    if "decoder_input_ids" in want:
        given["decoder_input_ids"] = torch.from_numpy(want["decoder_input_ids"])
        with torch.no_grad():
            return model(**given).logits.numpy(), want["logits"]
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    valid = want["attention_mask"].astype(bool)
    with torch.no_grad():
        return model(**given).logits.numpy()[valid], want["logits"][valid]


def test_adapters_on_one_base_equal_the_original(recorded: tuple[str, Path, eptc.Folder]) -> None:
    """Every task in one PeftModel, switched between, gives what the original code recorded."""
    name, source, folder = recorded
    first, *others = folder.tasks
    model = peft.PeftModel.from_pretrained(load(source / "base"), folder.path / first, first)
    for task in others:
        model.load_adapter(folder.path / task, adapter_name=task)
    for task in reversed(folder.tasks):
        model.set_adapter(task)
        want = np.load(source / "golden" / f"task{folder.tasks.index(task)}.npz")
        found, recorded_logits = original(model.eval(), want)
        np.testing.assert_allclose(found, recorded_logits, rtol=0, atol=SETS[name])


def test_merged_it_is_a_plain_model(
    recorded: tuple[str, Path, eptc.Folder],
) -> None:
    name, source, folder = recorded
    base = load(source / "base")
    names = set(base.state_dict())
    model = peft.PeftModel.from_pretrained(base, folder.path / "sst2").merge_and_unload().eval()
    assert set(model.state_dict()) == names
    found, want = original(model, np.load(source / "golden" / "task6.npz"))
    np.testing.assert_allclose(found, want, rtol=0, atol=SETS[name])


def test_ranks_are_no_larger_than_what_a_task_uses(
    recorded: tuple[str, Path, eptc.Folder],
) -> None:
    """top-k experts of rank 4, those of one size in one: at most 8, and 4 where there is one."""
    name, _, folder = recorded
    most = 4 if name == "t5-topk1" else 8
    for task in folder.tasks:
        assert 4 <= folder.details[task]["rank"] <= most
        assert folder.parity[task]["verified"]
        assert folder.parity[task]["text_probes"] > 0


@pytest.mark.parametrize(
    ("told", "written"), [("google/flan-t5-base", "google/flan-t5-base"), ("/home/ann/t5", None)]
)
def test_a_base_is_named_by_its_hub_s_name(
    copy_golden: Any, golden: Path, tmp_path: Path, told: str, written: str | None
) -> None:
    """Where it lay on the disk of who trained it is nobody's business."""
    copy = copy_golden("t5-tiny")
    path = copy.ckpt / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": told}))
    meta = json.loads((golden / "ept" / "t5-tiny" / "meta.json").read_text())
    folder = eptc.export(
        copy.ckpt, base=copy.base, task=1, tasks=meta["tasks"], top_k=meta["moe_top_k"],
        target="lora", out=tmp_path / "lora", verify=False,
    )  # fmt: skip
    config = json.loads((folder.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == written
