"""The folder that `--target lora` writes: its names, its bytes, what lies there already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.numpy

import eptc
from eptc.errors import (
    OutputError,
    TaskError,
)
from tests.lora_target.conftest import (
    CONFIG,
    PEFT_WARNINGS,
    PROVENANCE,
    TEXTS,
    WEIGHTS,
    agree,
    answers,
    ask,
    contents,
    load,
)

pytestmark = PEFT_WARNINGS


def test_two_exports_are_equal(native: Any, tmp_path: Path) -> None:
    ckpt, _ = native("deberta")
    found = []
    for name in ("one", "two"):
        moved = tmp_path / name / "in"
        shutil.copytree(ckpt.parent, moved)
        folder = eptc.export(
            moved / "ckpt", base=moved / "base", target="lora", task="all", max_rank=3,
            out=tmp_path / name / "out",
        )  # fmt: skip
        found.append(contents(folder.path))
    assert found[0] == found[1]
    assert len({path.stat().st_mode for path in folder.path.glob("score/*")}) == 1
    assert sorted(found[0])[:2] == [PROVENANCE, f"score/{CONFIG}"]
    assert not any(str(tmp_path).encode() in content for content in found[0].values())


def test_the_folder_says_what_it_was_made_from(native: Any, tmp_path: Path) -> None:
    import hashlib

    ckpt, base = native("t5")
    folder = eptc.export(ckpt, base=base, target="lora", task="all", out=tmp_path / "out")
    assert json.loads((folder.path / PROVENANCE).read_text()) == {
        "schema": 1, "target": "lora", "folders": ["tone", "topic"],
    }  # fmt: skip
    said = json.loads((folder.path / "topic" / PROVENANCE).read_text())
    assert (said["target"], said["tasks"]) == ("lora", [TEXTS[1].to_json()])
    assert (
        said["base"]["sha256"]
        == json.loads((ckpt / "ept_config.json").read_text())["base"]["sha256"]
    )
    assert [step["name"] for step in said["passes"]] == [
        "specialize-router", "drop-dead-experts", "factor-pyramid",
    ]  # fmt: skip
    factored = said["passes"][-1]
    assert 0 < factored["error"] <= 1
    assert 0 < factored["bound"] < 1e-5
    assert said["adapter"] == folder.details["topic"]
    assert said["adapter"]["lost"] is None
    assert 0 < said["adapter"]["rounding"] < 1e-6
    for name, record in said["files"].items():
        content = (folder.path / "topic" / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    assert sorted(said["files"]) == [CONFIG, WEIGHTS]


def _rename_score(ckpt: Path, name: str) -> None:
    described = json.loads((ckpt / "ept_config.json").read_text())
    described["tasks"][2]["name"] = name
    (ckpt / "ept_config.json").write_text(json.dumps(described))
    tensors = safetensors.numpy.load_file(ckpt / "ept_model.safetensors")
    tensors = {n.replace("heads.score.", f"heads.{name}."): t for n, t in tensors.items()}
    safetensors.numpy.save_file(tensors, ckpt / "ept_model.safetensors")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("how good", "how%20good"), ("a/b", "a%2Fb"), ("gut für", "gut%20f%C3%BCr")],
)
def test_names_that_folders_have_in_other_letters(
    native: Any, tmp_path: Path, name: str, folder: str
) -> None:
    """PEFT loads what is there; the folder says whose it is, and is known again."""
    ckpt, base = native("bert")
    _rename_score(ckpt, name)
    out = tmp_path / "out"
    given: dict[str, Any] = {"base": base, "target": "lora", "task": "all", "out": out}
    built = eptc.export(ckpt, **given)
    assert built.tasks == ("tone", "topic", name)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [PROVENANCE, folder, "tone", "topic"]
    )
    said = json.loads((out / folder / PROVENANCE).read_text())
    assert [task["name"] for task in said["tasks"]] == [name]
    model = peft.PeftModel.from_pretrained(load(base, num_labels=1), out / folder).eval()
    agree(ask(model), answers(ckpt, base, name))
    eptc.export(ckpt, **given, verify=False, force=True)


@pytest.mark.parametrize("name", ["..", ".a", "~", "eptc.json", "Tone", 80 * "ü"])
def test_names_that_are_no_folders(native: Any, tmp_path: Path, name: str) -> None:
    ckpt, base = native("bert")
    _rename_score(ckpt, name)
    with pytest.raises(TaskError, match="export this task by itself"):
        eptc.export(ckpt, base=base, target="lora", task="all", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    eptc.export(ckpt, base=base, target="lora", task=2, out=tmp_path / "out", verify=False)


def test_what_lies_there(native: Any, tmp_path: Path) -> None:
    """Folders of eptc's own are replaced with force, others never."""
    ckpt, base = native("llama")
    given: dict[str, Any] = {"base": base, "target": "lora", "verify": False}
    out = tmp_path / "out"
    eptc.export(ckpt, task="all", out=out, **given)
    with pytest.raises(OutputError, match="is not empty"):
        eptc.export(ckpt, task="all", out=out, **given)
    eptc.export(ckpt, task="topic", out=out, force=True, **given)
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS, PROVENANCE]
    eptc.export(ckpt, task="all", out=out, force=True, **given)
    (out / "mine").mkdir()
    before = contents(out)
    with pytest.raises(OutputError, match="holds folders that eptc did not write, such as mine"):
        eptc.export(ckpt, task="tone", out=out, force=True, **given)
    assert contents(out) == before


@pytest.mark.parametrize("when", ["task topic", "parity: linears of topic"])
def test_cut_short_it_leaves_nothing(native: Any, tmp_path: Path, when: str) -> None:
    ckpt, base = native("llama")

    def progress(event: Any) -> None:
        if event == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eptc.export(
            ckpt, base=base, target="lora", task="all", out=tmp_path / "out", progress=progress
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
