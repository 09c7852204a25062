"""Base models: any sharding and any float type, nothing read before it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from eptc.checkpoint.base import BaseModel, read_base
from eptc.errors import BaseModelError, CheckpointError, InputError
from eptc.nn import base_sha256
from eptc.tensors import StoredTensor, as_dtype

SETS = ("t5-tiny", "t5-gated-tiny", "llama-tiny")


def shard(folder: Path, count: int) -> None:
    """Split a base's weights into several files and an index, as large models have them."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    file.unlink()
    index: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        # Every third tensor, backwards: the order on disk must not matter.
        part = dict(reversed(list(tensors.items())[i::count]))
        safetensors.numpy.save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("name", SETS)
def test_shards_equal_a_single_file(copy_golden: Callable[..., Any], name: str) -> None:
    folders = copy_golden(name)
    whole = read_base(folders.base)
    weights = {n: t.numpy() for n, t in whole.weights.items()}
    digest = whole.sha256
    shard(folders.base, 3)

    sharded = read_base(folders.base)

    assert sharded.sha256 == digest == base_sha256(folders.base)
    assert sharded.weights.keys() == weights.keys()
    for n, tensor in sharded.weights.items():
        np.testing.assert_array_equal(tensor.numpy(), weights[n])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_are_cast_once(
    write_base: Callable[..., Path], dtype: str, rng: np.random.Generator
) -> None:
    """Half precision is exact in float32; its hash is that of what is stored."""
    stored = rng.standard_normal((5, 4)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    folder = write_base({"model.layers.0.mlp.up_proj.weight": stored})
    base = read_base(folder)
    weight = base.weights["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == dtype
    upcast = as_dtype(weight, "float32").numpy()
    assert upcast.dtype == np.float32
    np.testing.assert_array_equal(upcast, stored.astype(np.float32))
    assert base.sha256 == base_sha256(folder)


def test_nothing_is_read_before_it_is_asked_for(
    copy_golden: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = copy_golden()
    reads: list[str] = []
    numpy = StoredTensor.numpy

    def counted(tensor: StoredTensor) -> Any:
        reads.append(tensor.name)
        return numpy(tensor)

    monkeypatch.setattr(StoredTensor, "numpy", counted)
    base = read_base(folders.base)
    assert base.linears["decoder.block.1.layer.2.DenseReluDense.wo"] == (64, 100)
    assert reads == []
    assert len(base.sha256) == 64
    assert sorted(reads) == sorted(base.stored)


def _bert(write_base: Callable[..., Path], names: dict[str, Any], **config: Any) -> BaseModel:
    tensors = {n: np.full((2, 2), float(i + 1), np.float32) for i, n in enumerate(names)}
    return read_base(write_base(tensors, **config))


@pytest.mark.parametrize(
    ("model_type", "stored", "canonical"),
    [
        ("bert", "encoder.layer.0.output.dense.bias", "bert.encoder.layer.0.output.dense.bias"),
        ("bert", "bert.pooler.dense.weight", "bert.pooler.dense.weight"),
        ("bert", "embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("roberta", "embeddings.word_embeddings.weight",
         "roberta.embeddings.word_embeddings.weight"),
        ("llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("t5", "encoder.embed_tokens.weight", "shared.weight"),
        ("t5", "lm_head.weight", "shared.weight"),
        ("bert", "cls.predictions.bias", None),
        ("roberta", "roberta.pooler.dense.weight", None),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)  # fmt: skip
def test_names_that_others_saved(
    write_base: Callable[..., Path], model_type: str, stored: str, canonical: str | None
) -> None:
    base = _bert(write_base, {stored: None}, model_type=model_type)
    assert list(base.weights) == ([canonical] if canonical else [])
    assert base.unused == (() if canonical else (stored,))


TIED = ("decoder.embed_tokens.weight", "shared.weight", "lm_head.weight")


def test_tied_tensors_become_one(write_base: Callable[..., Path]) -> None:
    equal = dict.fromkeys(TIED, np.ones((3, 2), np.float32))
    base = read_base(write_base(equal, model_type="t5"))
    assert list(base.weights) == ["shared.weight"]
    assert base.tied_head


def test_a_head_of_its_own_is_not_tied(write_base: Callable[..., Path]) -> None:
    """Whatever the configuration says: transformers keeps two tensors that differ apart."""
    for head in (np.zeros((3, 2), np.float32), np.ones((4, 2), np.float32)):
        tensors = {"shared.weight": np.ones((3, 2), np.float32), "lm_head.weight": head}
        base = read_base(write_base(tensors, model_type="t5"))
        assert sorted(base.weights) == ["lm_head.weight", "shared.weight"]
        assert not base.tied_head


def test_embeddings_that_differ_are_refused(write_base: Callable[..., Path]) -> None:
    tensors = {name: np.full((3, 2), i, np.float32) for i, name in enumerate(TIED[:2])}
    with pytest.raises(BaseModelError, match=r"shared.weight twice, .* different numbers"):
        read_base(write_base(tensors, model_type="t5"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite(
    write_base: Callable[..., Path], value: float, dtype: Any
) -> None:
    weight = np.zeros((3, 4), dtype)
    weight[2, 1] = value
    base = read_base(write_base({"model.norm.weight": weight}))
    with pytest.raises(InputError, match=r"model.norm.weight .* at \[2, 1\]"):
        assert base.sha256


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "BITSANDBYTES"),
        ({"load_in_8bit": True}, "BITSANDBYTES"),
        ({"_load_in_4bit": True, "quant_method": "fp8"}, "FP8"),
        ("gptq", "UNKNOWN"),
    ],
)
def test_quantised_bases(write_base: Callable[..., Path], quantization: Any, name: str) -> None:
    folder = write_base({}, quantization_config=quantization)
    with pytest.raises(BaseModelError, match=rf"quantised \({name}\)"):
        read_base(folder)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_weights_that_are_no_floats(write_base: Callable[..., Path], dtype: Any) -> None:
    with pytest.raises(BaseModelError, match="not quantised"):
        read_base(write_base({"model.norm.weight": np.zeros(4, dtype)}))


OUTSIDE = ("../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", 7, None)


@pytest.mark.parametrize("shard_name", OUTSIDE)
def test_an_index_that_points_outside(write_base: Callable[..., Path], shard_name: Any) -> None:
    folder = write_base({})
    index = {"weight_map": {"model.norm.weight": shard_name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="outside its folder"):
        read_base(folder)


@pytest.mark.parametrize("value", [v for v in OUTSIDE if v is not None])
@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_a_configuration_that_points_outside(
    write_base: Callable[..., Path], where: str, value: Any
) -> None:
    folder = write_base({}, **({"transformers_weights": value} if where == "config" else {}))
    if where == "tokenizer":
        (folder / "tokenizer_config.json").write_text(json.dumps({"vocab_file": value}))
    with pytest.raises(BaseModelError, match="outside its folder"):
        read_base(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index.update(weight_map={}), "no weight_map"),
        (lambda index: index.update(weight_map=["a"]), "no weight_map"),
        (lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors"),
         "lacks ghost"),
        (lambda index: index["weight_map"].pop("shared.weight"), "does not list shared.weight"),
        (lambda index: index["weight_map"].update(ghost="gone.safetensors"), "cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_index(
    copy_golden: Callable[..., Any], change: Callable[[Any], object], words: str
) -> None:
    folders = copy_golden()
    shard(folders.base, 3)
    file = folders.base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises((BaseModelError, CheckpointError), match=words):
        read_base(folders.base)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no config.json"),
        ("", "cannot be read as JSON"),
        ("{'model_type': 'llama'}", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "model type is None"),
        ('{"model_type": ["llama"]}', "model type is"),
        ('{"model_type": "gpt2"}', "model type is 'gpt2'"),
        ('{"model_type": "lama"}', "'llama' is the nearest"),
    ],
)
def test_bad_configurations(write_base: Callable[..., Path], text: str | None, words: str) -> None:
    folder = write_base({})
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=words):
        read_base(folder)


def test_folders_without_weights(write_base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="is not a folder"):
        read_base(tmp_path / "nowhere")
    folder = write_base({})
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"no model.safetensors and no .*index.json"):
        read_base(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"only pytorch_model\.bin"):
        read_base(folder)
