"""Reading either format: equal meaning, nothing read too early, folders told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc import checkpoint
from eptc.checkpoint import detect, read_task_spec
from eptc.errors import CheckpointError, OptionError, TaskError
from eptc.tensors import StoredTensor

NAMES = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The file of every tensor whose numbers are read."""
    files: list[Path] = []
    numpy = StoredTensor.numpy

    def counted(tensor: StoredTensor) -> Any:
        files.append(tensor.path)
        return numpy(tensor)

    monkeypatch.setattr(StoredTensor, "numpy", counted)
    return files


@pytest.mark.parametrize("name", ["t5-tiny", "t5-gated-tiny", "llama-tiny"])
def test_inspect_reads_no_number_of_the_base(golden: Path, reads: list[Path], name: str) -> None:
    folder = golden / "ept" / name
    report = eptc.inspect(folder / "adapter", base=folder / "base", top_k=2, tasks=NAMES)
    assert len(report["routes"]) == 8
    assert {path.parent.name for path in reads} == {"adapter"}


def test_each_adapter_tensor_is_checked_when_it_is_taken(golden: Path, reads: list[Path]) -> None:
    """A NaN is met before anything is built; nothing of the base is read for that."""
    folder = golden / "ept" / "t5-tiny"
    source = checkpoint.read(folder / "adapter", folder / "base", top_k=2, tasks=NAMES)
    assert len(reads) == len(source.contents.tensors)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 16 / 4),
        ({"use_rslora": True}, 16 / 2),
        ({"alpha_pattern": {"k": 5, "wo": 7}}, None),
    ],
)
@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_converted_means_the_same(
    copy_golden: Callable[..., Any], name: str, options: dict[str, Any], scale: float | None
) -> None:
    folders = copy_golden(name)
    file = folders.ckpt / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    released = checkpoint.read(folders.ckpt, folders.base, top_k=2, tasks=NAMES)
    eptc.convert(folders.ckpt, base=folders.base, out=folders.out, top_k=2, tasks=NAMES)

    native = checkpoint.read(folders.out, folders.base)

    native.check_base()
    assert native.contents.format == "native"
    assert native.contents.tasks == released.contents.tasks
    assert native.contents.kernel_sizes == released.contents.kernel_sizes
    assert native.contents.base_sha256 == released.base.sha256
    assert native.contents.adapters.keys() == released.contents.adapters.keys()
    for path, adapter in native.contents.adapters.items():
        if scale is not None:
            assert adapter.branches[0].scale == pytest.approx(scale, rel=1e-15)
        for task_id in range(8):
            np.testing.assert_allclose(
                adapter.delta(task_id),
                released.contents.adapters[path].delta(task_id),
                rtol=1e-15,  # a rank or alpha of its own is written as a decimal
                atol=0,
            )
    if "alpha_pattern" not in options:
        assert json.loads((folders.out / "ept_config.json").read_text())["modules"] == {}


def test_converting_twice_gives_equal_bytes(copy_golden: Callable[..., Any]) -> None:
    folders = copy_golden()
    for name in ("one", "two"):
        eptc.convert(
            folders.ckpt, base=folders.base, out=folders.root / name, top_k=2, tasks=NAMES
        )
    one, two = ({p.name: p.read_bytes() for p in (folders.root / n).iterdir()}
                for n in ("one", "two"))  # fmt: skip
    assert one == two
    assert sorted(one) == ["ept_config.json", "ept_model.safetensors"]


def test_a_native_checkpoint_is_not_converted(copy_native: Any) -> None:
    with pytest.raises(OptionError, match="is a native checkpoint"):
        eptc.convert(copy_native.ckpt, base=copy_native.base, out=copy_native.out)
    assert not copy_native.out.exists()


def test_another_base_of_the_same_shape(copy_native: Any) -> None:
    """The recorded hash tells a fine-tuned base from the one that was trained on."""
    file = copy_native.base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    source = checkpoint.read(copy_native.ckpt, copy_native.base)
    with pytest.raises(CheckpointError, match=r"another base model .*\n.*small-bert"):
        source.check_base()


def test_formats_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        detect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither"):
        detect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert detect(tmp_path).name == "released"
    (tmp_path / "ept_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="native, released"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"base_model_name_or_path": "t5-base"}', "calls 't5-base'"),
        ("{}", "it was trained on"),
        ("not json", "it was trained on"),
    ],
)
def test_no_base_names_the_one_that_is_wanted(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(OptionError, match=words):
        checkpoint.read(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("3", "holds no list of tasks"),
        ('{"task": []}', "holds no list of tasks"),
        ("[7]", "described by 7"),
        ('[{"name": "a"}]', "no 'kind'"),
        ('[{"name": "a", "kind": "chat"}]', "the kind 'chat'"),
        ('[{"name": "a", "kind": "generation", "promt": "x"}]', "did you mean 'prompt'"),
        ('[{"name": "a", "kind": "generation", "prompt": "{x}"}]', "names 'x'"),
        ('[{"name": "a", "kind": "generation", "prompt": "{"}]', "bad prompt"),
        ('[{"name": "a", "kind": "generation", "fields": "text"}]', "expected: a list"),
        ('[{"name": "a", "kind": "generation", "max_length": 0}]', "max_length 0"),
        ('[{"name": "a", "kind": "generation"}, {"name": "a", "kind": "generation"}]', "twice"),
    ],
)
def test_bad_task_descriptions(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "tasks.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TaskError, match=words):
        read_task_spec(file)


@pytest.mark.parametrize("wrapped", [False, True])
def test_task_descriptions(golden: Path, tmp_path: Path, wrapped: bool) -> None:
    """A described task replaces the published one of its name; others keep theirs."""
    tasks = [{"name": "rte", "kind": "text-to-text", "prompt": "is {text}?", "labels": ["y", "n"]}]
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps({"tasks": tasks} if wrapped else tasks))
    folder = golden / "ept" / "t5-tiny"
    source = checkpoint.read(
        folder / "adapter", folder / "base", top_k=2, tasks=NAMES, task_spec=file
    )
    described = {task.name: task for task in source.contents.tasks}
    assert described["rte"].labels == ("y", "n")
    assert described["sst2"].labels == ("negative", "positive")
    file.write_text(file.read_text().replace('"rte"', '"rta"'))
    with pytest.raises(TaskError, match=r"names 'rta'\nexpected: one of cola"):
        checkpoint.read(folder / "adapter", folder / "base", top_k=2, tasks=NAMES, task_spec=file)
