"""What `--target lora` refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import eptc
from eptc.errors import (
    CheckpointError,
    EptcError,
    OptionError,
    TaskError,
)
from tests.lora_target.conftest import (
    BASES,
    PEFT_WARNINGS,
)

pytestmark = PEFT_WARNINGS


def test_what_no_lora_says_is_refused(
    small_routed: Any, write_tucka: Any, small_mept: Any, tmp_path: Path
) -> None:
    for folders, words in (
        (small_routed, "chooses experts by the input.*: no LoRA does"),
        (write_tucka("bert"), "chooses experts by the input.*: no LoRA does"),
        (small_mept("t5"), "puts prompts before the text"),
    ):
        with pytest.raises(CheckpointError, match=words) as refused:
            eptc.export(
                folders.ckpt, base=folders.base, target="lora", task=0, out=tmp_path / "out"
            )
        assert "--target onnx" in str(refused.value)
        assert not (tmp_path / "out").exists()


def test_parameters_beside_the_low_ranks_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BASES["llama"][0]()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "ckpt"))
    with pytest.raises(CheckpointError, match=r"such as lm_head\.weight"):
        eptc.export(tmp_path / "ckpt", base=tmp_path / "base", target="lora", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": None}, TaskError, "3 tasks, and none was chosen"),
        ({"task": "tome"}, TaskError, "did you mean 'tone'"),
        ({"task": "tone,tome"}, TaskError, "did you mean 'tone'"),
        ({"task": "tone,mood"}, TaskError, "'tone' is chosen twice: as 'tone' and as 'mood'"),
        ({"task": ["topic", 1]}, TaskError, "'topic' is chosen twice"),
        ({"task": []}, TaskError, "tasks chosen are"),
        ({"task": "tone,"}, TaskError, "tasks chosen are"),
        ({"max_rank": 0}, OptionError, "--max-rank is 0"),
        ({"max_rank": -3}, OptionError, "--max-rank is -3"),
        ({"precision": "int8"}, OptionError, "--precision int8 was given together with"),
        ({"precision": "all"}, OptionError, "--precision all was given together with"),
        ({"calibration": "texts"}, OptionError, "--calibration texts was given"),
        ({"routing": "frozen"}, OptionError, "--routing frozen was given together with"),
        ({"optimize_for": "cuda"}, OptionError, "--optimize-for cuda was given together with"),
        ({"probe": "texts"}, OptionError, "--probe texts was given together with"),
        ({"data": "rows", "max_drop": 0.0}, OptionError, "--data rows was given"),
        ({"max_drop": 0.0}, OptionError, "--max-drop 0.0 was given"),
        ({"passes": ["x"]}, OptionError, "--pass was given together with"),
        ({"target": "onnx", "max_rank": 4}, OptionError, "it with --target lora"),
        ({"target": "lora2"}, OptionError, "or lora or"),
    ],
)  # fmt: skip
def test_bad_options(
    native: Any, tmp_path: Path, options: dict[str, Any], error: type[EptcError], words: str
) -> None:
    ckpt, base = native("bert")
    given: dict[str, Any] = {"target": "lora", "task": "tone", **options}
    with pytest.raises(error, match=words) as refused:
        eptc.export(ckpt, base=base, out=tmp_path / "out", **given)
    assert refused.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nothing_is_predicted_of_what_is_no_engine(native: Any) -> None:
    ckpt, base = native("bert")
    with pytest.raises(OptionError, match="--target lora writes none"):
        eptc.plan(ckpt, base=base, target="lora", task="tone")
