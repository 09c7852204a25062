"""Pages about packs: every task of the checkpoint that is given, switched to and folded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc.errors import BundleError, ParityError
from eptc.runtime.seal import sealed
from tests.page.test_page import Page

PARTS = ["tone", "tone, folded", "score", "score, folded"]


def test_every_task(pack: Path, pack_page: tuple[Path, Any], small_native: Any) -> None:
    path, content = pack_page
    assert content.passed
    written = Page(path)
    assert "<h1>tone, score</h1>" in written.text
    assert list(content.parity.tasks) == PARTS
    plain = eptc.parity(pack, reference=small_native.ckpt, base=small_native.base, task="score")
    assert content.parity.tasks["score"].tensors == plain.tensors
    checks = {(row[0], row[1]): row[2] for row in written.tables["checks"][1:]}
    for name in ("tone", "score"):
        for what in ("origin", "interface", "weights", "tokenizer"):
            assert checks[what, name] == "passed"
    assert checks["graphs", "model, folded"] == "passed"
    assert checks["files", "score.onnx_adapter"] == "passed"
    outputs = [row[0] for row in written.tables["tensors"][1:]]
    assert len(outputs) == 2 * 2 * len(plain.tensors) == len(content.parity.tensors)
    adapted = {row[1] for row in written.tables["layers"][1:] if row[3] == "adapted"}
    assert adapted == set(content.routes.linears)
    passes = [row[1] for row in written.tables["passes"][1:]]
    assert {"factor-pyramid, tone", "factor-pyramid, score", "stable-names"} <= set(passes)
    assert any(row[0] == "tone.onnx_adapter" for row in written.tables["files"][1:])


def test_one_task(page: Callable[..., Any], pack: Path) -> None:
    _, content = page(pack, task="score")
    assert content.passed
    assert list(content.parity.tasks) == PARTS[2:]


def test_a_task_of_another_checkpoint(
    page: Callable[..., Any], pack: Path, small_native: Any, tmp_path: Path
) -> None:
    """It is left to a comparison with its own, and said; where it was asked for, it fails."""
    from safetensors.numpy import load_file, save_file

    copy = Path(shutil.copytree(pack, tmp_path / "pack"))
    other = Path(shutil.copytree(small_native.ckpt, tmp_path / "other"))
    (file,) = other.glob("*.safetensors")
    tensors = {name: array * np.float32(2) for name, array in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    eptc.add_task(copy, other, base=small_native.base, task="tone", name="mood", verify=False)
    _, content = page(copy)
    assert content.passed
    assert list(content.parity.tasks) == PARTS
    (left,) = [o for o in content.outcomes if o.name == "origin" and o.part == "mood"]
    assert left.state == "skipped"
    assert "was made from another checkpoint" in left.why
    _, content = page(copy, reference=other)
    assert content.passed
    assert list(content.parity.tasks) == ["mood", "mood, folded"]
    _, content = page(copy, task="mood")
    assert [o.name for o in content.failed] == ["origin"]
    with pytest.raises(BundleError, match="was made from another checkpoint"):
        content.checked()


def test_factors_that_are_off(page: Callable[..., Any], pack: Path, tmp_path: Path) -> None:
    """With the hashes to go with them: task, layer and file are named, the other task passes."""
    import hashlib

    from eptc.packs.task import write_adapter
    from eptc.runtime import read_pack
    from eptc.runtime.pack_tensors import read_tensors

    copy = Path(shutil.copytree(pack, tmp_path / "pack"))
    tensors = read_tensors(copy, read_pack(copy), "tone")
    first = next(name for name in tensors if ".query." in name and name.endswith(".A"))
    tensors[first] = tensors[first] * np.float32(1.5)
    write_adapter(copy / "tone.onnx_adapter", tensors)
    manifest = json.loads((copy / "pack.json").read_text())
    content = (copy / "tone.onnx_adapter").read_bytes()
    manifest["tasks"]["tone"] |= {
        "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)
    }  # fmt: skip
    (copy / "pack.json").write_text(json.dumps(sealed(manifest)))
    _, found = page(copy)
    failed = {(o.name, o.part) for o in found.failed}
    assert {("weights", "tone"), ("tensors", "tone"), ("tensors", "tone, folded")} <= failed
    assert not {part for _, part in failed} - {"tone", "tone, folded"}
    assert found.divergence.layer.layer == first.removesuffix(".A")
    assert found.divergence.step.endswith("tone.onnx_adapter is another than such a build writes")
    with pytest.raises(ParityError, match="checks failed; weights tone"):
        found.checked()


def test_a_place_that_was_changed(page: Callable[..., Any], pack: Path, tmp_path: Path) -> None:
    """Only the folded engine reads it; with its hash mended, it alone is off."""
    copy = Path(shutil.copytree(pack, tmp_path / "pack"))
    manifest = json.loads((copy / "pack.json").read_text())
    linear = next(m for m in manifest["linears"].values() if m["in_features"] == m["out_features"])
    linear["transposed"] = not linear["transposed"]
    (copy / "pack.json").write_text(json.dumps(manifest))
    _, found = page(copy)
    assert [o.name for o in found.failed] == ["manifest"]
    (copy / "pack.json").write_text(json.dumps(sealed(manifest)))
    _, found = page(copy)
    failed = {(o.name, o.part) for o in found.failed}
    assert ("tensors", "tone, folded") in failed
    assert ("tensors", "tone") not in failed


def test_scores(page: Callable[..., Any], pack: Path, tmp_path: Path) -> None:
    """Rows of data name their tasks as the pack does."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"task": "tone", "text": "a good film", "label": "good"}\n'
        '{"task": "tone", "text": "very dull", "label": "bad"}\n'
    )
    _, content = page(pack, data=data)
    assert content.passed
    assert list(content.checked().scores) == ["tone"]
    assert content.checked().scores["tone"]["rows"] == 2


def test_the_command(cli: Any, pack: Path, small_native: Any, tmp_path: Path) -> None:
    given = "--base", small_native.base, "--report", tmp_path / "r.html"
    done = cli("parity", pack, "--reference", small_native.ckpt, *given)
    assert done.code == 0, done.stderr
    assert "  tone, folded: " in done.stdout
    assert (tmp_path / "r.html").is_file()
    done = cli("export", small_native.ckpt, "--task", "tone,score", "--layout", "pack", "-o",
               tmp_path / "pack", *given)  # fmt: skip
    assert done.code == 2
    assert "--report is about an engine" in done.stderr
