"""verify: a sound bundle, and each way of damaging one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eptc.errors import BundleError
from eptc.runtime import MANIFEST, load_manifest, verify
from eptc.runtime.seal import sealed

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def bundle(classifier: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier.path, tmp_path / "bundle"))


def test_sound(classifier: Any, writer: Any) -> None:
    """Every file is as it was written, every graph loads."""
    for toy in (classifier, writer):
        report = verify(toy.path)
        assert report.ok
        report.raise_for_problems()
        assert report.graphs == {"model": None}
        assert set(report.files) == {"model.onnx", "weights.bin", "tokenizer.json"}
        assert report.warnings == ()
        assert json.loads(json.dumps(report.to_json()))["ok"] is True


def flip(name: str, position: int = -1) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[position] ^= 1
        (bundle / name).write_bytes(data)

    return change


def link(bundle: Path) -> None:
    (bundle / "weights.bin").rename(bundle.parent / "weights.bin")
    (bundle / "weights.bin").symlink_to(bundle.parent / "weights.bin")


DAMAGE = {
    "first byte of the weights": (flip("weights.bin", 0), "weights.bin: has SHA-256"),
    "last byte of the weights": (flip("weights.bin"), "weights.bin: has SHA-256"),
    "a byte of the graph": (flip("model.onnx", 40), "model.onnx: has SHA-256"),
    "a byte of the tokenizer": (flip("tokenizer.json", 9), "tokenizer.json: has SHA-256"),
    "cut weights": (lambda b: (b / "weights.bin").write_bytes(b"1"), "has 1 bytes instead of"),
    "missing weights": (lambda b: (b / "weights.bin").unlink(), "cannot be read"),
    "linked weights": (link, "is a link"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged(bundle: Path, damage: Callable[[Path], object], message: str) -> None:
    """One byte is enough; nothing of a damaged bundle is loaded."""
    damage(bundle)
    report = verify(bundle)
    assert not report.ok
    assert len(report.problems) == 1
    assert message in report.problems[0]
    assert report.graphs == {"model": "not loaded"}
    with pytest.raises(BundleError, match=r"SHA-256|bytes|cannot|link"):
        report.raise_for_problems()


def test_what_hashes_do_not_see(bundle: Path, rewrite: Callable[..., Path]) -> None:
    """A graph that is not ONNX, or not the declared one, is found by loading it."""
    manifest = load_manifest(bundle)
    values = {
        name: getattr(manifest, name)
        for name in ("task", "num_labels", "vocab_size", "tokenizer", "graphs")
    }
    graph = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(b"not a graph")
    rewrite(bundle, "encoder-classifier", **values)
    assert "does not load" in verify(bundle).problems[0]

    (bundle / "model.onnx").write_bytes(graph)
    (bundle / "tokenizer.json").write_text("{}")
    data = rewrite(bundle, "encoder-classifier", **values) / MANIFEST
    assert "not a tokenizers file" in verify(bundle).problems[0]

    changed = json.loads(data.read_text())
    changed["graphs"]["model"]["inputs"][0]["dtype"] = "int32"
    changed["graphs"]["model"]["outputs"][0]["shape"] = ["batch", 3]
    data.write_text(json.dumps(sealed(changed)))
    problem = verify(bundle).problems[0]
    assert "('input_ids', 'int64') instead of ('input_ids', 'int32')" in problem

    changed["graphs"]["model"]["inputs"][0]["dtype"] = "int64"
    changed["graphs"]["model"]["outputs"][0]["shape"] = ["batch", 4]
    data.write_text(json.dumps(sealed(changed)))
    assert "logits has shape ['batch', 3] instead of ['batch', 4]" in verify(bundle).problems[0]


def test_warnings(bundle: Path) -> None:
    """What harms nothing is said, and is no failure."""
    (bundle / "notes.txt").write_text("mine")
    data = json.loads((bundle / MANIFEST).read_text())
    data["parity"] = {"verified": False}
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    report = verify(bundle)
    assert report.ok
    assert "notes.txt is not listed in the manifest" in report.warnings[0]
    assert "not compared with its reference" in report.warnings[1]


def test_nothing_to_check_against(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        verify(tmp_path)
