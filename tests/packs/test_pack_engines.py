"""Packs of other models: recorded T5 and Llama checkpoints, and heads of several parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import transformers
from safetensors.numpy import save_file

import eptc
from eptc.runtime import Engine, Pack

Given = Mapping[str, Any]


def _recorded(golden: Path, name: str) -> tuple[Path, dict[str, Any]]:
    folder = golden / "ept" / name
    meta = json.loads((folder / "meta.json").read_text())
    given = {"base": folder / "base", "tasks": meta["tasks"], "top_k": meta["moe_top_k"]}
    return folder, given


@pytest.mark.parametrize("name", ["t5-tiny", "t5-gated-tiny", "llama-tiny"])
def test_recorded_checkpoints(golden: Path, tmp_path: Path, name: str) -> None:
    """Tasks of a pack, one of them added, write what their own bundles write."""
    folder, given = _recorded(golden, name)
    out, ckpt, names = tmp_path / "pack", folder / "adapter", given["tasks"]
    eptc.export(ckpt, task=[names[0], names[3]], layout="pack", out=out, **given)
    eptc.add_task(out, ckpt, task=names[5], **given)
    assert eptc.verify(out).ok
    pack = Pack.load(out, providers=["cpu"])
    rng, logits = np.random.default_rng(0), dict[str, Any]()
    ids = rng.integers(3, 60, (3, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for task in (names[3], names[5]):
        alone = tmp_path / task
        eptc.export(ckpt, task=task, out=alone, verify=False, **given)
        with Engine.load(alone, providers=["cpu"]) as engine:
            want, first = engine.generate_ids(feeds, 8), _first(engine, feeds)
        for folded in (False, True):
            with pack.engine(task, folded=folded) as engine:
                assert engine.generate_ids(feeds, 8) == want
                got = _first(engine, feeds)
            for key, array in first.items():
                bound = 3e-5 * max(1.0, np.abs(array).max())
                np.testing.assert_allclose(got[key], array, rtol=0, atol=bound)
        logits[task] = next(iter(first.values()))
    one, two = logits.values()
    assert np.abs(one - two).max() > 1e-3


def _first(engine: Engine, feeds: Given) -> dict[str, Any]:
    """Return what the engine's first graph makes of a batch."""
    if engine.manifest.kind == "encoder-decoder":
        return engine.run(feeds, "encoder")
    generation = engine.manifest.generation
    assert generation is not None
    batch, length = feeds["input_ids"].shape
    shape = (batch, generation.num_key_value_heads, 0, generation.head_dim)
    given = {**feeds, "position_ids": np.broadcast_to(np.arange(length), (batch, length))}
    names = [spec.name for spec in engine.manifest.graphs["model"].inputs]
    return engine.run({n: given.get(n, np.zeros(shape, np.float32)) for n in names})


def test_one_adapter_serves_encoder_and_decoder(golden: Path, tmp_path: Path) -> None:
    """Plain ONNX Runtime gives each session the whole file of a task."""
    folder, given = _recorded(golden, "t5-tiny")
    out, task = tmp_path / "pack", given["tasks"][2]
    eptc.export(folder / "adapter", task=[task], layout="pack", out=out, verify=False, **given)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(out / f"{task}.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    want = np.load(folder / "golden" / "task2.npz")
    mask = want["attention_mask"]
    encoder, decoder = (
        onnxruntime.InferenceSession(out / f"{n}.onnx") for n in ("encoder", "decoder")
    )
    names = [value.name for value in encoder.get_outputs()]
    states = encoder.run(None, {"input_ids": want["input_ids"], "attention_mask": mask}, options)
    found = dict(zip(names, states, strict=True))
    feeds = {n.replace("present", "past_key_values"): v for n, v in found.items() if "." in n}
    for value in decoder.get_inputs():
        if value.name.startswith("past_key_values.") and value.name not in feeds:
            feeds[value.name] = np.zeros(
                (len(mask), value.shape[1], 0, value.shape[3]), np.float32
            )
    feeds |= {"input_ids": want["decoder_input_ids"], "encoder_attention_mask": mask}
    logits = decoder.run(["logits"], feeds, options)[0]
    np.testing.assert_allclose(
        found["last_hidden_state"], want["encoder_last_hidden_state"], atol=5e-5
    )
    np.testing.assert_allclose(logits, want["logits"], atol=5e-5)


SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 36, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def _roberta() -> Any:
    config = transformers.RobertaConfig(**SHAPE, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def _deberta() -> Any:
    config = transformers.DebertaV2Config(
        **SHAPE, num_labels=3, relative_attention=True, position_biased_input=False,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
        position_buckets=4, max_relative_positions=12, pooler_hidden_size=24,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config)


def _bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SHAPE, num_labels=3)
    )


def _write_lora(
    folder: Path, model: Any, linears: tuple[str, ...], head: tuple[str, ...], labels: int
) -> Path:
    """Write an adapter of every linear of some names, and a head of its own."""
    rng, tensors = np.random.default_rng(labels), dict[str, Any]()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in linears:
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((4, module.in_features))
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((module.out_features, 4))
    for name in head:
        shape = [labels if size == 3 else size for size in model.get_parameter(name).shape]
        tensors[name] = rng.standard_normal(shape)
    folder.mkdir()
    save_file(
        {f"base_model.model.{n}": t.astype(np.float32) for n, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 2,
        "target_modules": list(linears), "base_model_name_or_path": "small",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = [f"l{i}" for i in range(labels)]
    spec = [{"name": folder.name, "kind": "classification", "labels": names}]
    (folder / "tasks.json").write_text(json.dumps(spec))
    return folder


_DENSE = ("classifier.dense.weight", "classifier.dense.bias")
_OUT = ("classifier.out_proj.weight", "classifier.out_proj.bias")
_PLAIN = ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize(
    ("build", "linears", "head"),
    [
        (_roberta, ("query", "value"), (*_DENSE, *_OUT)),
        (_deberta, ("query_proj", "dense"), _PLAIN),
        (_bert, ("query", "classifier"), ()),  # the base's own head, adapted
    ],
)
def test_heads_of_other_models(
    tmp_path: Path, build: Callable[[], Any], linears: tuple[str, ...], head: tuple[str, ...]
) -> None:
    transformers.set_seed(3)
    model, base = build(), tmp_path / "base"
    model.save_pretrained(base)
    first = _write_lora(tmp_path / "first", model, linears, head, 3)
    second = _write_lora(tmp_path / "second", model, linears, head, 5 if head else 3)
    given: dict[str, Any] = {"base": base, "task_spec": first / "tasks.json", "tasks": ["first"]}
    out = tmp_path / "pack"
    eptc.export(first, task="first", layout="pack", out=out, **given)
    given2 = {**given, "task_spec": second / "tasks.json", "tasks": ["second"]}
    eptc.add_task(out, second, **given2)
    pack = Pack.load(out, providers=["cpu"])
    ids = np.random.default_rng(0).integers(3, 40, (3, 9))
    for name, folder, options in (("first", first, given), ("second", second, given2)):
        alone = tmp_path / f"alone-{name}"
        eptc.export(folder, out=alone, verify=False, **options)
        with Engine.load(alone, providers=["cpu"]) as engine:
            inputs = [spec.name for spec in engine.manifest.graphs["model"].inputs]
            feeds = {n: np.ones_like(ids) if n == "attention_mask" else ids for n in inputs}
            if "token_type_ids" in feeds:
                feeds["token_type_ids"] = np.zeros_like(ids)
            want = engine.run(feeds)["logits"]
        for folded in (False, True):
            got = pack.engine(name, folded=folded).run(feeds)["logits"]
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())
