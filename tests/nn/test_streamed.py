"""A model whose base stays on disk gives what it gives in memory, one block after the other."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from eptc.errors import BaseModelError, CheckpointError, TaskError
from eptc.nn import EptConfig, EptModel, load_base, load_reference
from eptc.nn.adapted import ReferenceModel
from eptc.nn.shards import Shards
from eptc.nn.streamed import StreamedModel, Visit, stream_reference
from eptc.tasks import Task

MakeBase = Callable[..., Path]
Trained = Callable[..., EptModel]

TARGETS = {
    "bert": ("query", "intermediate.dense"),
    "bert-classifier": ("query", "bert.pooler.dense"),
    "roberta": ("value",),
    "t5": ("q", "v", "wo"),
    "llama": ("q_proj", "down_proj", "lm_head"),
}
STACKS = {
    "bert": [["bert.encoder.layer.0", "bert.encoder.layer.1"]],
    "bert-classifier": [["bert.encoder.layer.0", "bert.encoder.layer.1"]],
    "roberta": [["roberta.encoder.layer.0", "roberta.encoder.layer.1"]],
    "t5": [["encoder.block.0"], ["decoder.block.0"]],
    "llama": [["model.layers.0", "model.layers.1"]],
}


def same(_: Path) -> None:
    """Leave the base as transformers writes it."""


def in_bfloat16_shards(base: Path) -> None:
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    index = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{i % 3}.safetensors"
        index[name] = file
        found = base / file
        old = safetensors.torch.load_file(found) if found.exists() else {}
        new = {**old, name: tensor.to(torch.bfloat16)}
        safetensors.torch.save_file(new, found, metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    shards = {"metadata": {}, "weight_map": index}
    (base / "model.safetensors.index.json").write_text(json.dumps(shards))


def renamed(base: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = base / "model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def as_first_released(base: Path) -> None:
    """A norm's weight was called gamma, its bias beta, and the file held the model around it."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        names = {}
        for name in tensors:
            last = ".".join(name.split(".")[-2:])
            names[name] = "bert." + name.removesuffix(last) + old.get(last, last)
        kept = {names[name]: tensor for name, tensor in tensors.items()}
        return {**kept, "cls.predictions.bias": torch.zeros(3)}

    renamed(base, change)


def with_a_head_of_its_own(base: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        source = tensors.get("shared.weight", tensors.get("model.embed_tokens.weight"))
        assert source is not None
        return {**tensors, "lm_head.weight": source.flip(0).clone()}

    renamed(base, change)


BASES: dict[str, tuple[str, dict[str, Any], Callable[[Path], None]]] = {
    "bert": ("bert", {}, same),
    "bert, old names": ("bert", {}, as_first_released),
    "bert with a pooler that is adapted": ("bert-classifier", {}, same),
    "roberta": ("roberta", {}, same),
    "t5": ("t5", {}, same),
    "t5, untied": ("t5", {"tie_word_embeddings": False}, with_a_head_of_its_own),
    "llama": ("llama", {}, same),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, same),
    "llama in bfloat16, sharded": ("llama", {}, in_bfloat16_shards),
}


@pytest.fixture
def make(
    make_base: MakeBase, trained: Trained, plain: EptConfig, tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a native checkpoint on a tiny base; both folders."""

    def write(what: str, **options: Any) -> tuple[Path, Path]:
        kind, changes, damage = BASES[what]
        if what == "llama, tied":
            options.setdefault("targets", ("q_proj", "down_proj"))
        base = make_base(kind, **changes)
        damage(base)
        options = {"targets": TARGETS[kind], **options}
        if kind in ("t5", "llama"):
            options["tasks"] = (Task("one", "generation"), Task("two", "generation"))
        trained(base, dataclasses.replace(plain, **options)).save(tmp_path / "ckpt", base_dir=base)
        return tmp_path / "ckpt", base

    return write


def batches(model: ReferenceModel) -> list[dict[str, Tensor]]:
    made = []
    for rows, length in ((2, 7), (1, 1), (3, 4)):
        ids = (torch.arange(rows * length).reshape(rows, length) * 7 + 3) % 40
        mask = torch.ones_like(ids)
        mask[-1, : length // 2] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if model.hf.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids.flip(1)
        made.append(batch)
    return made


def run(model: StreamedModel, task: str | int, **more: Any) -> tuple[list[Visit], list[Tensor]]:
    outputs: list[Any] = []
    visits = list(model.run(task, batches(model.model), outputs, **more))
    return visits, [output.logits for output in outputs]


def close(got: Tensor, want: Tensor) -> None:
    """A matrix at another place in memory may be added up in another order."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-6)


def resident(model: StreamedModel) -> list[str]:
    """Names of the base's parameters that are in memory."""
    kept = (".experts.", ".router.", ".task_embedding", ".tasks.")
    return [
        name
        for name, parameter in model.model.hf.named_parameters(remove_duplicate=False)
        if not parameter.is_meta and not any(part in name for part in kept)
    ]


@pytest.mark.parametrize("what", BASES)
def test_equals_the_whole_model(make: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    ckpt, base = make(what)
    whole, streamed = load_reference(ckpt, base), stream_reference(ckpt, base)
    assert streamed.blocks == STACKS[BASES[what][0]]
    assert resident(streamed) == []
    reads: collections.Counter[str] = collections.Counter()
    sound = Shards.read

    def read(self: Shards, name: str) -> Tensor:
        reads[name] += 1
        return sound(self, name)

    monkeypatch.setattr(Shards, "read", read)
    for task in range(len(whole.tasks)):
        reads.clear()
        visits, found = run(streamed, task)
        for got, batch in zip(found, batches(whole), strict=True):
            with torch.no_grad():
                close(got, whole(task=task, **batch).logits)
        assert resident(streamed) == []
        visited = [visit.path for visit in visits]
        assert len(set(visited)) == len(visited)
        blocks = [name for stack in streamed.blocks for name in stack]
        assert [path for path in visited if path in blocks] == blocks
        # Each weight once for all batches; a tied one wherever it is used.
        assert {name for name, count in reads.items() if count > 1} <= {
            "shared.weight",
            "model.embed_tokens.weight",
        }
    extra = {"generation_config"} if whole.hf.can_generate() else set()
    for name in extra:
        assert getattr(streamed.model.hf, name).to_dict() == getattr(whole.hf, name).to_dict()


def test_blocks_follow_one_another(make: Any) -> None:
    """What a block is given is what the one before it gave."""
    _, base = folders = make("llama")
    streamed = stream_reference(*folders)
    visits = {visit.path: visit for visit in run(streamed, 0)[0]}
    first, second = (visits[f"model.layers.{i}"] for i in (0, 1))
    for given, made in zip(second.inputs, first.outputs, strict=True):
        assert torch.equal(given, made)
    embedding = load_base(base).get_input_embeddings()
    for given, batch in zip(first.inputs, batches(streamed.model), strict=True):
        assert torch.equal(given, embedding(batch["input_ids"]))


def test_one_block_in_memory_at_a_time(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = stream_reference(*make("llama"))
    most: list[set[str]] = []
    sound = torch.nn.functional.linear

    def linear(*arguments: Any) -> Tensor:
        most.append({".".join(name.split(".")[:3]) for name in resident(streamed)})
        return sound(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    run(streamed, 0)
    assert len(most) > 20
    assert max(map(len, most)) == 1


def test_shared_factors(make: Any) -> None:
    ckpt, base = make("bert", sharing="model")
    whole, streamed = load_reference(ckpt, base), stream_reference(ckpt, base)
    with torch.no_grad():
        want = whole(task=1, **batches(whole)[0]).logits
    close(run(streamed, 1)[1][0], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_weights(make: Any, dtype: torch.dtype) -> None:
    """Linears that are asked for compute with one weight; nothing of it stays."""
    ckpt, base = make("llama")
    whole, streamed = load_reference(ckpt, base), stream_reference(ckpt, base)
    before = run(streamed, 0)[1]
    paths = [path for path in whole.layers if "layers.1" in path or path == "lm_head"]
    found = run(streamed, 0, stored=dict.fromkeys(paths, lambda own: own.to(dtype)))[1]
    for path in paths:
        layer = whole.layers[path]
        layer.weight.data = (layer.weight + layer.dense(0)).to(dtype).float()
        layer.experts.factors.B.data.zero_()
    for got, batch in zip(found, batches(whole), strict=True):
        with torch.no_grad():
            want = whole(task=0, **batch).logits
        close(got, want)
    assert not torch.equal(found[0], before[0])
    assert all(map(torch.equal, before, run(streamed, 0)[1]))


def test_unknown_task(make: Any) -> None:
    streamed = stream_reference(*make("bert"))
    with pytest.raises(TaskError):
        run(streamed, "no such task")


def test_base_that_lacks_a_weight(make: Any) -> None:
    ckpt, base = make("llama")
    config = json.loads((ckpt / "ept_config.json").read_text())
    config["base"]["sha256"] = None
    (ckpt / "ept_config.json").write_text(json.dumps(config))
    name = "model.layers.1.mlp.up_proj.weight"
    renamed(base, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(BaseModelError, match=f"no weights for {name}"):
        stream_reference(ckpt, base)


def test_base_of_another_shape(make: Any) -> None:
    ckpt, base = make("llama")
    config = json.loads((ckpt / "ept_config.json").read_text())
    config["base"]["sha256"] = None
    (ckpt / "ept_config.json").write_text(json.dumps(config))
    name = "model.norm.weight"
    renamed(base, lambda tensors: {**tensors, name: torch.ones(7)})
    with pytest.raises(BaseModelError, match=f"{name} has the shape"):
        stream_reference(ckpt, base)


def test_another_base(make: Any, make_base: MakeBase) -> None:
    ckpt, _ = make("llama")
    with pytest.raises(BaseModelError, match="SHA-256"):
        stream_reference(ckpt, make_base("llama", seed=5))


def test_checkpoint_of_another_base(make: Any, make_base: MakeBase) -> None:
    ckpt, _ = make("llama")
    config = json.loads((ckpt / "ept_config.json").read_text())
    config["base"] = {}
    (ckpt / "ept_config.json").write_text(json.dumps(config))
    with pytest.raises((BaseModelError, CheckpointError)):
        stream_reference(ckpt, make_base("bert"))


def test_file_that_ends_early(make: Any) -> None:
    """The base is cut off after it was opened."""
    ckpt, base = make("llama")
    streamed = stream_reference(ckpt, base)
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BaseModelError, match="ends inside"):
        run(streamed, 0)


def test_integers_are_no_weights(make: Any) -> None:
    ckpt, base = make("llama")
    config = json.loads((ckpt / "ept_config.json").read_text())
    config["base"]["sha256"] = None
    (ckpt / "ept_config.json").write_text(json.dumps(config))
    name = "model.norm.weight"
    renamed(base, lambda tensors: {**tensors, name: tensors[name].to(torch.int32)})
    with pytest.raises(BaseModelError, match="has the type I32"):
        run(stream_reference(ckpt, base), 0)
