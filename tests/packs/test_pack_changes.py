"""Tasks that are added to a pack and removed: proven, in one step, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc.errors import (
    BundleError,
    CheckpointError,
    OptionError,
    OutputError,
    ParityError,
    TaskError,
)
from eptc.packs.task import task_tensors
from eptc.runtime import Engine, Pack
from tests.conftest import Folders, Outcome
from tests.packs.conftest import TEXTS, Packed

Cli = Callable[..., Outcome]


def _shares(answers: Any) -> np.ndarray[Any, Any]:
    return np.array([answer.probabilities for answer in answers])


def test_added_and_removed_the_pack_is_as_before(packed: Packed) -> None:
    before = packed.digests()
    packed.add(task="same")
    after = packed.digests()
    assert {name for name in after if after[name] != before.get(name)} == {
        "pack.json", "same.onnx_adapter",
    }  # fmt: skip
    eptc.remove_task(packed.path, "same")
    assert packed.digests() == before


def test_a_task_that_was_added_answers(packed: Packed, alone: Callable[[str], Path]) -> None:
    packed.add(task="same")
    assert eptc.verify(packed.path).ok
    with Engine.load(alone("same"), providers=["cpu"]) as engine:
        want = engine.classify(TEXTS["same"])
    for folded in (False, True):
        with Pack.load(packed.path, providers=["cpu"]).engine("same", folded=folded) as engine:
            got = engine.classify(TEXTS["same"])
        assert [a.label for a in got] == [a.label for a in want]
        np.testing.assert_allclose(_shares(got), _shares(want), rtol=0, atol=3e-6)


def test_built_at_once_or_one_by_one(packed: Packed, tmp_path: Path) -> None:
    """The pack of three tasks is the pack of two with the third added."""
    packed.add(task="same")
    out = tmp_path / "all"
    eptc.export(packed.folders.ckpt, base=packed.folders.base, task="tone,score,same",
                layout="pack", out=out)  # fmt: skip
    assert Packed(out, packed.folders).digests() == packed.digests()


def test_a_lora_of_the_same_base(packed: Packed, write_lora: Callable[..., Path]) -> None:
    folder = write_lora()
    options: dict[str, Any] = {"tasks": ["mood"], "task_spec": folder / "tasks.json"}
    packed.add(folder, **options)
    engine = Pack.load(packed.path, providers=["cpu"]).engine("mood")
    assert engine.task is not None
    assert engine.task.labels == ("low", "flat", "high")
    answers = engine.classify(TEXTS["mood"])
    assert all(len(a.probabilities or ()) == 3 for a in answers)
    entry = packed.manifest()["tasks"]["mood"]
    assert entry["checkpoint"]["format"] == "lora"
    assert entry["ranks"] == {"4": 1}
    # What it does not adapt is the base.
    out = packed.path.parent / "alone"
    eptc.export(folder, base=packed.folders.base, out=out, verify=False, **options)
    with Engine.load(out, providers=["cpu"]) as other:
        want = other.classify(TEXTS["mood"])
    np.testing.assert_allclose(_shares(answers), _shares(want), rtol=0, atol=3e-6)
    with pytest.raises(TaskError, match="has a task 'mood' already"):
        packed.add(folder, **options)
    packed.add(folder, name="feeling", **options)
    assert list(packed.manifest()["tasks"]) == ["tone", "score", "mood", "feeling"]
    report = eptc.parity(packed.path, reference=folder, base=packed.folders.base, task="feeling")
    assert report.passed


def test_a_task_may_be_called_otherwise(packed: Packed, cli: Cli) -> None:
    ended = cli("pack", "add", packed.path, packed.folders.ckpt, "--base", packed.folders.base,
                "--task", "sentiment", "--as", "über/alles", "--json")  # fmt: skip
    assert ended.code == 0
    assert ended.json["added"] == "über/alles"
    assert ended.json["file"].startswith("task-")
    assert Pack.load(packed.path, providers=["cpu"]).engine("über/alles").classify(TEXTS["tone"])


def _refused(
    packed: Packed, error: type[Exception], said: str, *given: Any, **options: Any
) -> None:
    before = packed.digests()
    with pytest.raises(error, match=said):
        packed.add(*given, **options)
    assert packed.digests() == before


def test_a_linear_without_an_input_is_refused(
    packed: Packed, write_lora: Callable[..., Path]
) -> None:
    folder = write_lora("bert.encoder.layer.0.attention.self.key")
    said = r"adapts linears that no task .*: bert.*attention\.self\.key"
    options: dict[str, Any] = {"tasks": ["mood"], "task_spec": folder / "tasks.json"}
    _refused(packed, CheckpointError, said, folder, **options)


def test_another_base_is_refused(packed: Packed, copy_native: Folders) -> None:
    from safetensors.numpy import load_file, save_file

    path = copy_native.base / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    tensors["embeddings.word_embeddings.weight"][3, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    _refused(packed, CheckpointError, "is not the base of the pack", task="same",
             base=copy_native.base)  # fmt: skip


def test_another_configuration_is_refused(packed: Packed, copy_native: Folders) -> None:
    path = copy_native.base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    _refused(packed, CheckpointError, "is configured with layer_norm_eps = 1e-05", task="same",
             base=copy_native.base)  # fmt: skip


def test_another_tokenizer_is_refused(packed: Packed, copy_native: Folders) -> None:
    path = copy_native.base / "tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"fine"'))
    _refused(packed, CheckpointError, "another tokenizer .* tokenizer.json differs", task="same",
             base=copy_native.base)  # fmt: skip


def test_another_chat_template_is_refused(packed: Packed, copy_native: Folders) -> None:
    (copy_native.base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    _refused(packed, CheckpointError, "chat_template.jinja differs", task="same",
             base=copy_native.base)  # fmt: skip


@pytest.mark.parametrize("name", ["weights.bin", "model.onnx", "tokenizer.json"])
def test_a_pack_whose_files_changed_is_refused(packed: Packed, name: str) -> None:
    path = packed.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    what = "base file" if name == "weights.bin" else "file"
    _refused(packed, BundleError, f"the {what} of the pack was changed: {name}", task="same")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "tone"}, "has a task 'tone' already"),
        ({"task": "same", "name": "score"}, "has a task 'score' already"),
        ({"task": "same", "name": ""}, "called ''"),
        ({"task": "same", "name": "Sentiment"}, "is an alias of the task 'tone'"),
        ({"task": "sam"}, "there is no task 'sam': did you mean 'same'"),
        ({"task": "all"}, "several tasks were chosen: 'all'"),
        ({"task": "same,tone"}, "several tasks were chosen"),
        ({}, "there are 3 tasks, and none was chosen"),
    ],
)
def test_tasks_that_cannot_be_added(packed: Packed, options: dict[str, Any], said: str) -> None:
    _refused(packed, TaskError, said, **options)


def test_routes_that_read_the_input_are_refused(packed: Packed, small_routed: Folders) -> None:
    _refused(packed, CheckpointError, "chooses experts by the input", small_routed.ckpt,
             task="same")  # fmt: skip


def test_what_is_not_right_is_not_added(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:

    def wrong(*given: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = dict(task_tensors(*given))
        name = next(name for name in tensors if name.endswith(".B"))
        tensors[name] = tensors[name] * np.float32(1.001)
        return tensors

    monkeypatch.setattr("eptc.packs.changes.task_tensors", wrong)
    _refused(packed, ParityError, "is off at", task="same")


def test_without_parity_the_manifest_says_so(packed: Packed) -> None:
    packed.add(task="same", verify=False)
    assert packed.manifest()["tasks"]["same"]["parity"] == {"verified": False}


def test_a_task_that_was_not_compared_is_found_out_later(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:

    def doubled(*given: Any) -> dict[str, Any]:
        tensors: dict[str, Any] = dict(task_tensors(*given))
        return {name: array * 2 for name, array in tensors.items()}

    monkeypatch.setattr("eptc.packs.changes.task_tensors", doubled)
    packed.add(task="same", verify=False)
    with pytest.raises(ParityError, match="the weight"):
        eptc.parity(
            packed.path, reference=packed.folders.ckpt, base=packed.folders.base, task="same"
        )


@pytest.mark.parametrize(
    ("name", "said"), [("tome", "there is no task 'tome'"), ("sentiment", "there is no task")]
)
def test_tasks_that_cannot_be_removed(packed: Packed, name: str, said: str) -> None:
    before = packed.digests()
    with pytest.raises(TaskError, match=said):
        eptc.remove_task(packed.path, name)
    assert packed.digests() == before


def test_the_last_task_stays(packed: Packed, cli: Cli) -> None:
    assert cli("pack", "remove", packed.path, "tone").code == 0
    ended = cli("pack", "remove", packed.path, "score")
    assert ended.code == 2
    assert "is the last task of the pack" in ended.stderr
    assert eptc.verify(packed.path).ok


def test_a_bundle_has_no_tasks_to_change(alone: Callable[[str], Path], tmp_path: Path) -> None:
    for path in (alone("tone"), tmp_path):
        with pytest.raises(BundleError, match="not a pack"):
            eptc.remove_task(path, "tone")


_ADD = """
import sys, eptc
def tell(event):
    print(event, flush=True)
    if event == sys.argv[4]:
        sys.stdin.read(1)
eptc.add_task(sys.argv[1], sys.argv[2], base=sys.argv[3], task=sys.argv[5], verify=False,
              progress=tell)
"""


def _adding(packed: Packed, at: str, task: str) -> subprocess.Popen[str]:
    """Start to add a task in a process of its own; it says what it does, and waits at `at`."""
    arguments = [packed.path, packed.folders.ckpt, packed.folders.base, at, task]
    return subprocess.Popen(
        [sys.executable, "-c", _ADD, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0,
        env=os.environ | {"PYTHONPATH": os.curdir},
    )  # fmt: skip


def _until(process: subprocess.Popen[str], said: str) -> None:
    assert process.stdout is not None
    assert any(line == f"{said}\n" for line in process.stdout)


def test_a_killed_add_leaves_the_pack_as_it_was(packed: Packed) -> None:
    before = packed.digests()
    with _adding(packed, "publish", "same") as process:
        _until(process, "publish")
        process.send_signal(signal.SIGKILL)
    left = packed.digests()
    assert left.pop("same.onnx_adapter")  # written before the manifest
    assert left == before
    assert Pack.load(packed.path, providers=["cpu"]).engine("tone").classify(TEXTS["tone"])
    report = eptc.verify(packed.path)
    assert report.ok
    assert report.warnings == ("same.onnx_adapter is not listed in the manifest",)
    (packed.path / "pack.json.next").write_text("{")  # killed a moment later
    eptc.remove_task(packed.path, "score")
    assert sorted(packed.digests()) == sorted(set(before) - {"score.onnx_adapter"})


def test_two_adds_at_once_wait_for_each_other(packed: Packed) -> None:
    with _adding(packed, "publish", "same") as first:
        _until(first, "publish")
        with _adding(packed, "nowhere", "same") as second:
            _until(second, "wait for others who change the pack")
            assert second.stdout is not None
            assert not select.select([second.stdout], [], [], 1)[0]  # it says no more
            first.communicate("x")
            assert first.returncode == 0
            _until(second, "read the checkpoint")
            assert list(packed.manifest()["tasks"]) == ["tone", "score", "same"]
            second.communicate()
            assert second.returncode == 1  # the name is taken by now
    assert eptc.verify(packed.path).ok
    assert eptc.verify(packed.path).warnings == (
        "task 'same' was not compared with its reference when it was added",
    )


def test_a_pack_that_is_replaced_meanwhile_is_left_alone(packed: Packed) -> None:
    other = packed.path.with_name("other")

    def replace(event: Any) -> None:
        if event == "publish":
            packed.path.rename(other)
            other.joinpath("x").mkdir()
            other.joinpath("x").rename(packed.path)
            for file in other.iterdir():
                (packed.path / file.name).write_bytes(file.read_bytes())

    with pytest.raises(OutputError, match="was replaced while it was changed"):
        packed.add(task="same", verify=False, progress=replace)
    assert list(packed.manifest()["tasks"]) == ["tone", "score"]
    # The new one's files are its own, whatever they are called.
    assert (packed.path / "same.onnx_adapter").is_file()
    assert not (other / "same.onnx_adapter").exists()
    assert not (packed.path / "pack.json.next").exists()


def test_a_lost_file_of_another_task_harms_no_change(packed: Packed) -> None:
    (packed.path / "score.onnx_adapter").unlink()
    packed.add(task="same", verify=False)
    eptc.remove_task(packed.path, "tone")
    assert list(packed.manifest()["tasks"]) == ["score", "same"]
    assert any("score.onnx_adapter" in said for said in eptc.verify(packed.path).problems)
    eptc.remove_task(packed.path, "score")
    assert eptc.verify(packed.path).ok


@pytest.mark.parametrize(
    ("room", "said"), [(4, "cannot write same.onnx_adapter"), (48, "No space left on device")]
)
def test_a_disk_that_is_full(
    packed: Packed, small_disk: Callable[[int], Path], cli: Cli, room: int, said: str
) -> None:
    """No room for the task's file, or none for the manifest: exit 2, and the pack is as it was."""
    before = packed.digests()
    pages = sum(-(-path.stat().st_size // 4096) * 4 for path in packed.path.iterdir())
    full = small_disk(pages + room) / "pack"
    shutil.copytree(packed.path, full)
    given = [full, packed.folders.ckpt, "--base", packed.folders.base, "--no-verify"]
    ended = cli("pack", "add", *given, "--task", "same")
    assert ended.code == 2, ended
    assert said in ended.stderr
    assert dataclasses.replace(packed, path=full).digests() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_pack_that_may_not_be_written(packed: Packed) -> None:
    packed.path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="cannot be changed"):
            packed.add(task="same")
    finally:
        packed.path.chmod(0o755)


def test_the_command_line(packed: Packed, cli: Cli) -> None:
    given = [packed.path, packed.folders.ckpt, "--base", packed.folders.base]
    ended = cli("pack", "add", *given, "--task", "same")
    assert ended.code == 0
    assert "added same" in ended.stdout
    listed = cli("pack", "list", packed.path, "--json").json["tasks"]
    assert list(listed) == ["tone", "score", "same"]
    assert listed["same"]["verified"] is True
    assert "tone.onnx" not in (shown := cli("pack", "list", packed.path).stdout)
    assert "bad, good" in shown
    pair = ("--pair", "a good film", "a bad film")
    switched = cli("run", packed.path, "--task", "same", *pair)
    folded = cli("run", packed.path, "--task", "same", "--folded", *pair)
    assert switched.code == folded.code == 0
    assert switched.stdout.split("\t")[0] == folded.stdout.split("\t")[0]
    assert cli("run", packed.path, "good film").code == 2
    assert cli("verify", packed.path).stdout.startswith(f"{packed.path}: sound")
    shown = cli("inspect", packed.path).stdout
    assert "5 linears that tasks may adapt" in shown
    assert "same: parity passed" in shown
    assert cli("inspect", packed.path, "--json").json["what"] == "pack"
    assert cli("parity", packed.path, "--reference", packed.folders.ckpt, "--base",
               packed.folders.base, "--task", "same").code == 0  # fmt: skip
    bench = cli("bench", packed.path, "--task", "tone", "--batch", "1", "--length", "4",
                "--repeat", "1", "--json")  # fmt: skip
    assert bench.json["kind"] == "encoder-classifier"
    ended = cli("pack", "remove", packed.path, "same", "--json")
    assert ended.json["tasks"] == ["tone", "score"]


def test_parity_of_a_pack_asks_for_its_own_checkpoint(
    packed: Packed, copy_native: Folders, alone: Callable[[str], Path]
) -> None:
    from safetensors.numpy import load_file, save_file

    folders = packed.folders
    (path,) = copy_native.ckpt.glob("*.safetensors")
    tensors = {name: array * np.float32(2) for name, array in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="was made from another checkpoint"):
        eptc.parity(packed.path, reference=copy_native.ckpt, base=folders.base, task="tone")
    with pytest.raises(TaskError, match="none was chosen"):
        eptc.parity(packed.path, reference=folders.ckpt, base=folders.base)
    with pytest.raises(OptionError, match="which is no pack"):
        eptc.parity(alone("tone"), reference=folders.ckpt, base=folders.base, task="tone")


def test_scores_on_labelled_rows(packed: Packed, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text in TEXTS["tone"] for label in ("good", "bad")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = eptc.parity(
        packed.path, reference=packed.folders.ckpt, base=packed.folders.base, task="tone",
        data=data,
    )  # fmt: skip
    assert report.scores is not None
    assert report.scores["rows"] == len(rows)
    assert report.scores["flips"] == 0


def test_a_file_goes_after_the_manifest_that_lists_it(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, the pack is whole, and what is left goes with the next change."""
    right = Path.unlink

    def killed(path: Path, **options: Any) -> None:
        if path.name == "tone.onnx_adapter":
            raise KeyboardInterrupt
        right(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            eptc.remove_task(packed.path, "tone")
    assert list(packed.manifest()["tasks"]) == ["score"]
    report = eptc.verify(packed.path)
    assert report.ok
    assert report.warnings == ("tone.onnx_adapter is not listed in the manifest",)
    packed.add(task="same", verify=False)
    assert not (packed.path / "tone.onnx_adapter").exists()
