"""`--layout optimum`: bundles that optimum-onnx's ORTModel classes load, where they live."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import peft
import pytest
import torch
import transformers

import eptc
from eptc import bundle as bundle_files
from eptc.checks_of import checks_of
from eptc.errors import OptionError, ParityError
from eptc.interop import optimum
from eptc.interop.optimum import check_layout
from eptc.job import Job
from eptc.lower.first_step import first_step
from eptc.options import Options

# Loads a bundle as anybody would, and writes what it answers.
ANSWER = """
import json, sys
import numpy as np, torch
import optimum.onnxruntime
kind, folder, feeds, out, options = sys.argv[1:]
model = getattr(optimum.onnxruntime, kind).from_pretrained(folder)
given = {name: torch.from_numpy(array) for name, array in np.load(feeds).items()}
found = {"logits": model(**given).logits.numpy()} if kind.endswith("Classification") else {}
for number, wanted in enumerate(json.loads(options)):
    found[f"tokens.{number}"] = model.generate(**given, do_sample=False, **wanted).numpy()
np.savez(out, **found)
"""
TASKS = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
LENGTH = 7


@pytest.fixture
def ask(optimum_python: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that asks optimum."""

    def answer(kind: str, folder: Path, feeds: dict[str, Any], *options: Any) -> dict[str, Any]:
        np.savez(tmp_path / "feeds.npz", **feeds)
        hidden = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [optimum_python, "-c", ANSWER, kind, folder, tmp_path / "feeds.npz",
             tmp_path / "found.npz", json.dumps(options)],
            env={**hidden, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "found.npz") as found:
            return dict(found)

    return answer


def released(golden: Path, name: str, out: Path, **options: Any) -> eptc.Bundle:
    source = golden / "ept" / name
    bundle: eptc.Bundle = eptc.export(
        source / "adapter", base=source / "base", task="sst2", tasks=TASKS, top_k=2, out=out,
        **options,
    )  # fmt: skip
    return bundle


def batch(vocabulary: int, *, left: bool = False) -> dict[str, Any]:
    ids = np.random.default_rng(3).integers(3, vocabulary, (3, 9))
    mask = np.ones_like(ids)
    mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask[:, ::-1].copy() if left else mask}


def rows(tokens: Any, stops: tuple[int, ...], start: int) -> list[list[int]]:
    """Return generated tokens up to the first stop token."""
    found = []
    for row in tokens[:, start:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        found.append(row[: ends[0] + 1] if ends else row)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-tiny", "t5-gated-tiny"])
def test_t5(golden: Path, tmp_path: Path, ask: Callable[..., Any], name: str) -> None:
    """The engine's own greedy tokens, and what transformers' beams find."""
    bundle = released(golden, name, tmp_path / "out", layout="optimum")
    feeds = batch(bundle.manifest.vocab_size or 0)
    wanted = {"max_new_tokens": LENGTH}
    found = ask("ORTModelForSeq2SeqLM", bundle.path, feeds, wanted, {**wanted, "num_beams": 3})
    with bundle.load(providers=["cpu"]) as engine:
        own = engine.generate_ids(feeds, LENGTH)
    assert bundle.manifest.generation is not None
    stops = bundle.manifest.generation.eos_token_id
    assert rows(found["tokens.0"], stops, 1) == own
    folder = released(golden, name, tmp_path / "hf", target="hf")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder.path).eval()
    beams = model.generate(
        **{n: torch.from_numpy(a) for n, a in feeds.items()}, max_new_tokens=LENGTH,
        do_sample=False, num_beams=3,
    )  # fmt: skip
    assert found["tokens.1"].tolist() == beams.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"precision": "int8"}, {"precision": "int4"}, {"optimize_for": "cuda"}],
    ids=str,
)  # fmt: skip
def test_t5_of_other_kinds(
    golden: Path, tmp_path: Path, ask: Callable[..., Any], options: dict[str, Any]
) -> None:
    bundle = released(golden, "t5-tiny", tmp_path / "out", layout="optimum", **options)
    feeds = {name: array[:1] for name, array in batch(100).items()}
    found = ask("ORTModelForSeq2SeqLM", bundle.path, feeds, {"max_new_tokens": LENGTH})
    with bundle.load(providers=["cpu"]) as engine:
        own = engine.generate_ids(feeds, LENGTH)
    assert bundle.manifest.generation is not None
    assert rows(found["tokens.0"], bundle.manifest.generation.eos_token_id, 1) == own


@pytest.mark.slow
def test_a_decoder(golden: Path, tmp_path: Path, ask: Callable[..., Any]) -> None:
    bundle = released(golden, "llama-tiny", tmp_path / "out", layout="optimum")
    feeds = batch(200, left=True)
    found = ask("ORTModelForCausalLM", bundle.path, feeds, {"max_new_tokens": LENGTH})
    with bundle.load(providers=["cpu"]) as engine:
        own = engine.generate_ids(feeds, LENGTH)
    assert bundle.manifest.generation is not None
    assert rows(found["tokens.0"], bundle.manifest.generation.eos_token_id, 9) == own


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tone", "score"])
def test_a_classifier(
    small_native: Any, tmp_path: Path, ask: Callable[..., Any], task: str
) -> None:
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task=task, layout="optimum",
        out=tmp_path / "out",
    )  # fmt: skip
    with bundle.load(providers=["cpu"]) as engine:
        feeds = engine.tokenize(["a very good film", "bad"])
        want = engine.run(feeds)["logits"]
    found = ask("ORTModelForSequenceClassification", bundle.path, feeds)
    np.testing.assert_allclose(found["logits"], want, rtol=0, atol=1e-6)


def test_one_weights_file_for_all(golden: Path, tmp_path: Path) -> None:
    """Names and a graph apart, it is the same bundle: nothing is stored twice."""
    flat = released(golden, "t5-tiny", tmp_path / "flat")
    bundle = released(golden, "t5-tiny", tmp_path / "optimum", layout="optimum")
    renamed = {f"{role}.onnx": file for role, file in optimum.FILES.items()}
    for name in ("weights.bin", "tokenizer.json", "parity.json", *renamed):
        one, other = flat.path / name, bundle.path / renamed.get(name, name)
        assert one.read_bytes() == other.read_bytes(), name
    extra = {path.name for path in bundle.path.iterdir()} - {
        renamed.get(path.name, path.name) for path in flat.path.iterdir()
    }
    assert extra == {"decoder_model.onnx"}
    said = bundle.manifest.parity["layout"]
    assert said["graphs"] == ["decoder_model.onnx"]
    assert said["tensors"] == 36
    assert eptc.verify(bundle.path).ok
    again = released(golden, "t5-tiny", tmp_path / "again", layout="optimum")
    for path in bundle.path.iterdir():
        assert path.read_bytes() == (again.path / path.name).read_bytes(), path.name
    graph = onnx.load(bundle.path / "decoder_model.onnx", load_external_data=False)
    assert [value.name for value in graph.graph.input] == [
        "input_ids", "encoder_attention_mask", "encoder_hidden_states",
    ]  # fmt: skip


def test_its_parity_again(golden: Path, tmp_path: Path) -> None:
    bundle = released(golden, "t5-tiny", tmp_path / "out", layout="optimum")
    source = golden / "ept" / "t5-tiny"
    report = eptc.parity(bundle.path, reference=source / "adapter", base=source / "base")
    assert report.passed
    # What was added is compared with the engine's own graphs, by the page and in tests as well.
    file = bundle.path / "decoder_model.onnx"
    graph = onnx.load(file, load_external_data=False)
    made = [node for node in graph.graph.node if "present." in "".join(node.output)][:2]
    made[0].output[0], made[1].output[0] = made[1].output[0], made[0].output[0]
    onnx.save(graph, file)
    bundle_files.write_manifest(bundle.path, dataclasses.replace(bundle.manifest, files={}))
    given: dict[str, Any] = {"reference": source / "adapter", "base": source / "base"}
    with pytest.raises(ParityError, match=r"decoder_model\.onnx, which --layout optimum adds"):
        eptc.parity(bundle.path, **given)
    with checks_of(bundle.path, **given) as checks:
        (check,) = [each for each in checks if each.name == "first step"]
        with pytest.raises(ParityError, match=r"decoder_model\.onnx"):
            check.run()


def test_older_releases_read_the_configuration(small_native: Any, tmp_path: Path) -> None:
    """A type under both names, a tokenizer class that they have."""
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", layout="optimum", verify=False,
        out=tmp_path / "out",
    )  # fmt: skip
    config = json.loads((bundle.path / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((bundle.path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert bundle.manifest.parity == {
        "verified": False, "layout": {"name": "optimum", "graphs": []},
    }  # fmt: skip
    assert eptc.verify(bundle.path).ok


@pytest.mark.parametrize("precision", ["keep", "int8", "int4", "int8-weights"])
def test_a_first_step_of_every_precision(golden: Path, tmp_path: Path, precision: Any) -> None:
    """The same numbers as the engine's own graphs give."""
    bundle = released(
        golden, "t5-tiny", tmp_path / "out", layout="optimum", precision=precision
    )  # fmt: skip
    said = bundle.manifest.parity["layout"]
    assert said["largest_error"] <= said["its_bound"]
    assert said["tensors"] == 36


def test_a_base_without_a_generation_configuration(golden: Path, tmp_path: Path) -> None:
    """Special tokens are named: ORTModel classes read them there alone."""
    source = golden / "ept" / "t5-tiny"
    shutil.copytree(source / "base", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    bundle = eptc.export(
        source / "adapter", base=tmp_path / "base", task="sst2", tasks=TASKS, top_k=2,
        layout="optimum", verify=False, out=tmp_path / "out",
    )  # fmt: skip
    written = json.loads((bundle.path / "generation_config.json").read_text())
    assert written == {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    assert eptc.verify(bundle.path).ok


def test_prompts_before_the_text(small_mept: Any, tmp_path: Path) -> None:
    """The encoder's state is longer than the text, and so is the cache."""
    given = small_mept(layers=[])
    bundle = eptc.export(
        given.ckpt, base=given.base, layout="optimum", out=tmp_path / "out", allow_pickle=True
    )
    assert bundle.manifest.parity["layout"]["tensors"] > 0


@pytest.mark.parametrize("fault", ["keys for values", "a past that is not empty"])
def test_faults_are_found(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A first step that is not the engine's own is never published."""

    def spoiled(encoder: Any, decoder: Any) -> Any:
        if fault == "keys for values":
            outputs = encoder.graph.outputs
            outputs[1].name, outputs[2].name = outputs[2].name, outputs[1].name
        model = first_step(encoder, decoder)
        if fault != "keys for values":
            node = next(n for n in model.graph if n.op_type == "Concat" and "empty" in str(n.name))
            sizes: Any = node.inputs[1]
            sizes.const_value = onnx_ir.tensor(np.maximum(sizes.const_value.numpy(), 1))
        return model

    monkeypatch.setattr(optimum, "first_step", spoiled)
    with pytest.raises(ParityError, match=r"decoder_model\.onnx"):
        released(golden, "t5-tiny", tmp_path / "out", layout="optimum")
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layout": ({"layout": "onnxruntime"}, "the layout is 'onnxruntime'"),
    "bf16": (
        {"precision": "bf16", "optimize_for": "any"}, "--layout optimum was given together with",
    ),
    "genai": ({"genai_python": "python", "layout": "flat"}, "--genai-python was given together"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_make_no_sense(small_native: Any, tmp_path: Path, name: str) -> None:
    options, found = REFUSED[name]
    with pytest.raises(OptionError) as error:
        eptc.export(
            small_native.ckpt, base=small_native.base, task="tone", out=tmp_path / "out",
            **{"layout": "optimum", **options},
        )  # fmt: skip
    assert found in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_heads_of_another_width(tmp_path: Path) -> None:
    """Optimum makes an empty cache of hidden_size / num_attention_heads numbers a head."""
    shape = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=6,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(shape)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "ckpt"))
    with pytest.raises(OptionError, match="heads are 6 numbers wide, and optimum takes them"):
        eptc.export(
            tmp_path / "ckpt", base=tmp_path / "base", layout="optimum", out=tmp_path / "out"
        )


def test_too_little_memory_to_compare(golden: Path) -> None:
    source = golden / "ept" / "t5-tiny"
    options = Options("sst2", source / "base", tasks=TASKS, top_k=2, layout="optimum", verify=True)
    job = Job.read(source / "adapter", options)
    check_layout(job)
    small = dataclasses.replace(job, plan=dataclasses.replace(job.plan, limit=500_000))
    with pytest.raises(OptionError, match="adds a graph, which is compared as a whole"):
        check_layout(small)
    check_layout(dataclasses.replace(small, options=dataclasses.replace(options, verify=False)))
