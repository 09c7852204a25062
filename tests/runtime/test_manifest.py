"""The manifest: what is read back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eptc.errors import BundleError
from eptc.runtime import MANIFEST, SCHEMA_VERSION, Engine, Manifest, load_manifest, verify
from eptc.runtime.seal import SEAL, sealed, unsealed

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def bundle(classifier: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier.path, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))


def test_round_trip(classifier: Any, writer: Any) -> None:
    """JSON values and the class say the same; nothing is lost on the way."""
    for toy in (classifier, writer):
        data = unsealed(json.loads((toy.path / MANIFEST).read_text()))
        manifest = load_manifest(toy.path)
        assert manifest.to_json() == data
        assert Manifest.from_json(data) == manifest


def rename(key: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[new] = data.pop(key)

    return change


def put(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


RECORD = {"sha256": "0" * 64, "size": 1}
REFUSED = {
    "newer": (put(SCHEMA_VERSION + 1, "schema_version"), "schema version 4"),
    "version is a string": (put("1", "schema_version"), "'schema_version' is '1'"),
    "missing key": (rename("kind", "sort"), "no 'kind'"),
    "unknown key": (put(1, "tolls"), "unknown key 'tolls': did you mean 'tools'?"),
    "unknown kind": (put("decoder", "kind"), "'kind' is 'decoder'"),
    "other graphs": (rename("graphs", "graph"), "no 'graphs'"),
    "wrong role": (lambda d: d["graphs"].update(rename=1), "graph 'rename' is 1"),
    "missing input": (lambda d: d["graphs"]["model"]["inputs"].pop(0), "no input_ids"),
    "missing output": (put([], "graphs", "model", "outputs"), "no logits"),
    "strange dtype": (put("complex", "graphs", "model", "inputs", 0, "dtype"), "'complex'"),
    "strange dimension": (put([1.5], "graphs", "model", "inputs", 0, "shape"), "dimension"),
    "generation of a classifier": (
        put(
            {"decoder_start_token_id": 0, "eos_token_id": [1], "pad_token_id": 0,
             "max_new_tokens": 1, "num_layers": 1, "num_key_value_heads": 1, "head_dim": 1},
            "generation",
        ),
        "generation settings",
    ),
    "no labels": (put(None, "num_labels"), "no num_labels"),
    "other number of labels": (put(2, "num_labels"), "3 outputs, num_labels is 2"),
    "bad task": (put({"name": "x"}, "task"), "no 'kind'"),
    "bad hash": (put({"sha256": "ab", "size": 1}, "files", "weights.bin"), "sha256 is 'ab'"),
    "negative size": (put({"sha256": "0" * 64, "size": -1}, "files", "x"), "'size' is -1"),
    "unlisted graph": (put("other.onnx", "graphs", "model", "file"), "not listed"),
    "graph above": (put("../model.onnx", "graphs", "model", "file"), "'../model.onnx' is not a"),
    "graph at the root": (put("/model.onnx", "graphs", "model", "file"), "is not a file name"),
    "tokenizer above": (put("../t.json", "tokenizer", "file"), "'../t.json' is not a file name"),
    "file above": (put(RECORD, "files", "../weights.bin"), "is not a file name"),
    "file below": (put(RECORD, "files", "a/b"), "is not a file name"),
    "file on another drive": (put(RECORD, "files", "c:x"), "is not a file name"),
    "backslash": (put(RECORD, "files", "..\\x"), "is not a file name"),
    "dots": (put(RECORD, "files", ".."), "is not a file name"),
    "line break": (put(RECORD, "files", "x\n"), "is not a file name"),
    "itself": (put(RECORD, "files", MANIFEST), "is not a file name"),
    "missing file": (put(RECORD, "files", "gone.bin"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(bundle: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    """A manifest with one thing wrong is refused, by the engine too, and the thing is named."""
    edit(bundle, change)
    with pytest.raises(BundleError) as refusal:
        load_manifest(bundle)
    assert message in refusal.value.found
    with pytest.raises(BundleError):
        Engine.load(bundle)


def test_newer_says_what_to_do(bundle: Path) -> None:
    """Whatever a newer manifest holds, the answer is to upgrade."""
    (bundle / MANIFEST).write_text(json.dumps({"schema_version": 9, "new": []}))
    with pytest.raises(BundleError) as refusal:
        load_manifest(bundle)
    assert "upgrade eptc" in str(refusal.value)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_text(text)


def link(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        outside = bundle.parent / name
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)

    return change


FOLDERS = {
    "missing": (shutil.rmtree, "missing"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), "not a bundle"),
    "a checkpoint": (
        lambda b: ((b / MANIFEST).unlink(), (b / "ept_config.json").write_text("{}")),
        "a checkpoint, not a bundle",
    ),
    "not JSON": (write(MANIFEST, "{"), "not JSON"),
    "not text": (lambda b: (b / MANIFEST).write_bytes(b"\xff\xfe{"), "not JSON"),
    "a list": (write(MANIFEST, "[]"), "the manifest is []"),
    "too deep": (write(MANIFEST, "[" * 100_000), "not JSON"),
    "cut file": (write("weights.bin", "short"), "bytes"),
    "missing file": (lambda b: (b / "weights.bin").unlink(), "cannot be read"),
    "a folder": (lambda b: ((b / "weights.bin").unlink(), (b / "weights.bin").mkdir()), "not a"),
    "linked weights": (link("weights.bin"), "is a link"),
    "linked graph": (link("model.onnx"), "is a link"),
    "linked manifest": (link(MANIFEST), "is a link"),
    "dangling manifest": (
        lambda b: ((b / MANIFEST).unlink(), (b / MANIFEST).symlink_to("gone")), "is a link",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_refused_folder(bundle: Path, change: Callable[[Path], object], message: str) -> None:
    """A damaged folder is refused before anything of it is loaded."""
    change(bundle)
    with pytest.raises(BundleError, match=r"expected|to fix") as refusal:
        Engine.load(bundle)
    assert message in refusal.value.found


def test_a_file_is_no_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError, match="is a file"):
        load_manifest(bundle / MANIFEST)


def test_the_folder_itself_may_be_a_link(bundle: Path) -> None:
    """`current -> engine-7` is how services switch versions."""
    (bundle.parent / "current").symlink_to(bundle)
    with Engine.load(bundle.parent / "current", ["cpu"]) as engine:
        assert engine.classify(["the film"])


CHANGED = {
    "a token id": put(11, "tokenizer", "pad_token_id"),
    "the order of labels": put(["neutral", "negative", "positive"], "task", "labels"),
    "what is only told": put("another", "base", "name"),
    "the version": put(2, "schema_version"),
    "the hash": put("0" * 64, SEAL),
    "no hash": lambda data: data.pop(SEAL),
    "a hash that is none": put(None, SEAL),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_changed_later(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Whatever is changed in it without its hash, nothing is answered by it."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))
    for use in (load_manifest, Engine.load, verify):
        with pytest.raises(BundleError, match=r"was changed after|has no 'manifest_sha256'"):
            use(bundle)


def test_written_in_another_form(bundle: Path) -> None:
    """The hash is of what is said: tools that sort keys or strip spaces change nothing."""
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(data, sort_keys=True, separators=(",", ":")))
    assert load_manifest(bundle).to_json() == unsealed(data)


def test_of_an_earlier_version(bundle: Path) -> None:
    """It is read, and what cannot be known of it is said."""
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(unsealed(data) | {"schema_version": 2}))
    assert load_manifest(bundle).schema_version == 2
    assert "is of an earlier version" in verify(bundle).warnings[0]
