"""Saving and loading: the native format, the authors' folders, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from eptc.errors import BaseModelError, CheckpointError, EptcError, OptionError, TaskError
from eptc.nn import (
    EptConfig,
    EptModel,
    GateConfig,
    ModuleConfig,
    ScaleConfig,
    base_sha256,
    load_base,
    load_reference,
)
from eptc.tasks import GLUE, Task

MakeBase = Callable[..., Path]

SENTIMENT = Task("sentiment", "classification", labels=("negative", "positive"), aliases=("mood",))
TOPIC = Task("topic", "classification", labels=("a", "b", "c"))
SCORE = Task("score", "regression")

QUERY = "bert.encoder.layer.1.attention.self.query"
PLAIN = EptConfig(
    variant="paper",
    targets=("query", "intermediate.dense"),
    kernel_sizes=(2, 3, 4),
    top_k=2,
    rank=4,
    tasks=(SENTIMENT, TOPIC, SCORE),
)


def trained(base: Path, config: EptConfig, **options: Any) -> EptModel:
    """Return a model whose every trainable parameter is random: no zeros that hide mistakes."""
    model = EptModel.attach(load_base(base), config, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def logits(model: EptModel, task: str) -> Tensor:
    ids = torch.arange(3, 21).reshape(2, 9)
    extra = {"decoder_input_ids": ids[:, :3]} if model.hf.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(task=task, input_ids=ids, **extra).logits
    return found


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"variant": "released"},
    "one A and B": {"sharing": "model"},
    "d/T": {"scale": ScaleConfig("d/T", denominator=4)},
    "root": {"scale": ScaleConfig("alpha/sqrt(r)", alpha=8.5), "top_k": 3},
    "no normalization": {"gate": GateConfig("task", 0.5, "none"), "top_k": 1},
    "overrides": {"variant": "released", "modules": {QUERY: ModuleConfig(rank=6, alpha=3)}},
}


@pytest.mark.parametrize("changes", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip(make_base: MakeBase, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Saved and loaded: equal to the bit, configuration too; saved again: equal files."""
    base = make_base()
    model = trained(base, dataclasses.replace(PLAIN, **{"gate": None, **changes}))
    model.save(tmp_path / "one", base_dir=base, base_name="a tiny model")
    copy = EptModel.load(tmp_path / "one", base)
    assert copy.config == model.config
    assert not copy.training
    for task in model.tasks:
        assert torch.equal(logits(copy, task.name), logits(model, task.name))
    copy.save(tmp_path / "two")
    for name in ("ept_config.json", "ept_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "ept_config.json",
        "ept_model.safetensors",
    ]


def test_names_in_the_file(make_base: MakeBase, tmp_path: Path) -> None:
    trained(make_base(), PLAIN, head_modules=("bert.pooler.dense",)).save(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "ept_model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    assert {n: s for n, s in shapes.items() if n.startswith(f"{QUERY}.ept.")} == {
        f"{QUERY}.ept.A": [4, 18],
        f"{QUERY}.ept.B": [18, 4],
        f"{QUERY}.ept.kernels.0": [2, 2],
        f"{QUERY}.ept.kernels.1": [3, 3],
        f"{QUERY}.ept.kernels.2": [4, 4],
        f"{QUERY}.ept.router.weight": [3, 36],
        f"{QUERY}.ept.task_embedding": [3, 36],
    }
    assert {n: s for n, s in shapes.items() if n.startswith("heads.score.")} == {
        "heads.score.classifier.weight": [1, 36],
        "heads.score.classifier.bias": [1],
        "heads.score.bert.pooler.dense.weight": [36, 36],
        "heads.score.bert.pooler.dense.bias": [36],
    }
    assert not any("classifier.weight" in n and not n.startswith("heads.") for n in shapes)
    EptModel.load(tmp_path, make_base())


@pytest.mark.parametrize("kind", ["roberta", "t5", "llama"])
def test_other_models(make_base: MakeBase, tmp_path: Path, kind: str) -> None:
    base = make_base(kind)
    targets = {"roberta": ("key",), "t5": ("q", "wi"), "llama": ("v_proj", "gate_proj")}[kind]
    tasks = (SENTIMENT, SCORE) if kind == "roberta" else (GLUE["rte"], Task("free", "generation"))
    model = trained(base, dataclasses.replace(PLAIN, targets=targets, tasks=tasks))
    model.save(tmp_path / "saved", base_dir=base)
    copy = load_reference(tmp_path / "saved", base)
    for task in tasks:
        assert torch.equal(logits(copy, task.name), logits(model, task.name))
    if kind == "roberta":
        assert logits(copy, "score").shape == (2, 1)
        assert "heads.score.classifier.dense.weight" in safetensors.torch.load_file(
            tmp_path / "saved" / "ept_model.safetensors"
        )


def test_larger_tensors_and_other_floats(make_base: MakeBase, tmp_path: Path) -> None:
    """A and B may be wider than the largest crop, embeddings may have spare rows."""
    base = make_base()
    model = trained(base, PLAIN)
    model.save(tmp_path)
    path = tmp_path / "ept_model.safetensors"
    stored = {n: t.bfloat16() for n, t in safetensors.torch.load_file(path).items()}
    for part, dim in (("A", 1), ("B", 0), ("task_embedding", 0)):
        name = f"{QUERY}.ept.{part}"
        stored[name] = torch.cat([stored[name], torch.ones_like(stored[name])], dim)
    safetensors.torch.save_file(stored, path)
    copy = EptModel.load(tmp_path, base)
    assert copy.layers[QUERY].experts.factors.A.shape == (4, 36)
    for part, parameter in model.layers[QUERY].parts().items():
        parameter.data = copy.layers[QUERY].parts()[part].data[tuple(map(slice, parameter.shape))]
    x = torch.ones(2, 36)
    for task_id in range(3):
        found = copy.layers[QUERY].delta(x, task_id)
        assert torch.equal(found, model.layers[QUERY].delta(x, task_id))


def test_base_hash(make_base: MakeBase, tmp_path: Path) -> None:
    """Over sorted name, type, shape and bytes: the same however the weights are sharded."""
    base = make_base("llama")
    stored = safetensors.torch.load_file(base / "model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{name}\nF32\n{shape}\n".encode() + tensor.numpy().tobytes())
    assert base_sha256(base) == digest.hexdigest()
    sharded = tmp_path / "sharded"
    load_base(base).save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert base_sha256(sharded) == base_sha256(base)


def test_half_precision_bases_become_float32(make_base: MakeBase, tmp_path: Path) -> None:
    load_base(make_base("llama")).half().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in load_base(tmp_path / "half").parameters()} == {torch.float32}


def test_loading_is_quiet(make_base: MakeBase, capfd: pytest.CaptureFixture[str]) -> None:
    """No progress bar, no load report; the caller's random numbers are not used up."""
    base = make_base()
    capfd.readouterr()  # saving the base does show a bar
    state = torch.get_rng_state()
    load_base(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


# The authors' folders


def write_released(model: EptModel, directory: Path, **options: Any) -> Path:
    """Write a model as the released code does; its configuration has 8 experts and 8 tasks."""
    directory.mkdir()
    tensors = {}
    for path, layer in model.layers.items():
        for part, parameter in layer.parts().items():
            name, _, index = part.partition("kernels.")
            name = {
                "A": "lora_A.weight",
                "B": "lora_B.weight",
                "router.weight": "lora_gate.0.weight",
                "router.bias": "lora_gate.0.bias",
                "task_embedding": "lora_task_embedding.weight",
                "": f"lora_expert_kernels.{index}",
            }[name]
            tensor = parameter.detach().clone()
            tensors[f"base_model.model.{path}.{name}"] = (
                tensor[None, ..., None] if index else tensor
            )
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": model.config.rank,
        "lora_alpha": model.config.scale.alpha,
        "target_modules": list(model.config.targets),
        "use_rslora": model.config.scale.rule == "alpha/sqrt(r)",
        "use_dora": False,
        "bias": "none",
        **options,
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


RELEASED = dataclasses.replace(
    PLAIN,
    variant="released",
    gate=None,
    targets=("q_proj", "down_proj"),
    kernel_sizes=(2, 2, 3, 3, 4, 4, 6, 6),
    tasks=tuple(
        GLUE[name] for name in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
    ),
)
NAMES = [task.name for task in RELEASED.tasks]
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.self_attn.q_proj"
# Options of the adapter's configuration, and the ranks and scales they mean.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    "plain": ({}, {}, {DOWN: 4, UP: 4}),
    "rslora": ({}, {"scale": ScaleConfig("alpha/sqrt(r)", alpha=16)}, {DOWN: 8, UP: 8}),
    "rank pattern": (
        {"rank_pattern": {"down_proj": 8}},
        {"modules": {f"model.layers.{i}.mlp.down_proj": ModuleConfig(rank=8) for i in (0, 1)}},
        {DOWN: 2, UP: 4},
    ),
    "pattern of one module": (
        {"rank_pattern": {UP: 2}, "alpha_pattern": {UP: 10}},
        {"modules": {UP: ModuleConfig(rank=2, alpha=10)}},
        {DOWN: 4, UP: 5},
    ),
    "pattern with an expression": (
        {"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 2}},
        {"modules": {f"model.layers.{i}.self_attn.q_proj": ModuleConfig(alpha=2) for i in (0, 1)}},
        {DOWN: 4, UP: 0.5},
    ),
    # PEFT looks one key up in both patterns: the first that fits, ranks before alphas.
    "the first pattern wins": (
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"self_attn.q_proj": 2}},
        {},
        {DOWN: 4, UP: 4},
    ),
    "targets as an expression": (
        {"target_modules": r".*\.(q|down)_proj"},
        {},
        {DOWN: 4, UP: 4},
    ),
    "a target the base has not": (
        {"target_modules": ["q_proj", "down_proj", "wi"]},
        {},
        {DOWN: 4, UP: 4},
    ),
}


@pytest.mark.parametrize(("options", "changes", "scales"), OPTIONS.values(), ids=OPTIONS)
def test_released_options(
    make_base: MakeBase,
    tmp_path: Path,
    options: dict[str, Any],
    changes: dict[str, Any],
    scales: dict[str, float],
) -> None:
    base = make_base("llama")
    model = trained(base, dataclasses.replace(RELEASED, **changes))
    folder = write_released(model, tmp_path / "adapter", **options)
    loaded = load_reference(folder, base, top_k=2, tasks=NAMES)
    for path, scale in scales.items():
        assert loaded.layers[path].scaling == scale
    assert torch.equal(logits(loaded, "rte"), logits(model, "rte"))


def test_released_tasks_and_top_k(make_base: MakeBase, tmp_path: Path) -> None:
    """Fewer tasks than rows are fine; published names bring their prompts; top_k is clamped."""
    base = make_base("llama")
    folder = write_released(trained(base, RELEASED), tmp_path / "adapter")
    mine = Task("mine", "generation")
    loaded = load_reference(folder, base, top_k=99, tasks=["sst2", mine])
    assert loaded.tasks == (GLUE["sst2"], mine)
    assert loaded.config.top_k == 8
    assert loaded.layers[UP].task_embedding.shape == (8, 32)


Change = Callable[[Path], object]


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    """Return a change of the folder's tensors."""

    def apply(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        stored = safetensors.torch.load_file(path)
        change(stored)
        safetensors.torch.save_file(stored, path)

    return apply


def options(**changes: Any) -> Change:
    """Return a change of the folder's configuration; None removes a key."""

    def apply(folder: Path) -> None:
        (path,) = folder.glob("*config.json")
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in data.items() if v != "gone"}))

    return apply


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickled(content: Any, *, keep: bool = False) -> Change:
    def apply(folder: Path) -> None:
        stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(stored if keep else content, folder / "adapter_model.bin")

    return apply


def put(name: str, value: Tensor) -> Change:
    return tensors(lambda stored: stored.update({name: value}))


def drop(name: str) -> Change:
    return tensors(lambda stored: stored.pop(name))


KEY = f"base_model.model.{UP}"
BAD_RELEASED: dict[str, tuple[Change, type[EptcError], str]] = {
    "a tensor is missing": (drop(f"{KEY}.lora_A.weight"), CheckpointError, f"{UP} has no A"),
    "a kernel is missing": (drop(f"{KEY}.lora_expert_kernels.7"), CheckpointError, "kernels.0 to"),
    "an extra kernel": (
        put(f"{KEY}.lora_expert_kernels.8", torch.ones(1, 5, 6, 1)), CheckpointError, "kernels.8",
    ),
    "an extra tensor": (put(f"{KEY}.lora_C.weight", torch.ones(1)), CheckpointError, "lora_C"),
    "a linear is missing": (
        tensors(lambda s: [s.pop(name) for name in list(s) if name.startswith(KEY)]),
        CheckpointError, f"no tensors for {UP}",
    ),
    "a linear the base has not": (
        put("base_model.model.model.layers.7.mlp.down_proj.lora_A.weight", torch.ones(4, 16)),
        CheckpointError, r"layers\.7\.mlp\.down_proj has the kernels none",
    ),
    "a whole linear the base has not": (
        tensors(lambda s: [
            s.update({name.replace("layers.1", "layers.7"): s[name].clone()})
            for name in list(s) if name.startswith(KEY)
        ]),
        CheckpointError, r"has tensors for model\.layers\.7",
    ),
    "A of full width": (
        put(f"{KEY}.lora_A.weight", torch.ones(4, 32)),
        CheckpointError, r"A has the shape \[4, 32\]",
    ),
    "another rank": (options(r=6), CheckpointError, "expected: 6x"),
    "a kernel of another size": (
        put(f"{KEY}.lora_expert_kernels.0", torch.ones(1, 8, 4, 1)),
        CheckpointError, "kernel sizes",
    ),
    "a kernel with too few cells": (
        put(f"{KEY}.lora_expert_kernels.0", torch.ones(1, 15, 2, 1)),
        CheckpointError, r"\[15, 2\]",
    ),
    "a kernel of two axes": (
        put(f"{KEY}.lora_expert_kernels.0", torch.ones(16, 2)), CheckpointError, "cells, size",
    ),
    "seven embeddings": (
        put(f"{KEY}.lora_task_embedding.weight", torch.ones(7, 32)), CheckpointError, "7 rows",
    ),
    "NaN": (
        put(f"{KEY}.lora_gate.0.bias", torch.full((8,), math.nan)), CheckpointError, "NaN",
    ),
    "infinity": (
        put(f"{KEY}.lora_gate.0.bias", torch.full((8,), math.inf)), CheckpointError, "infinite",
    ),
    "integers": (put(f"{KEY}.lora_gate.0.bias", torch.ones(8).int()), CheckpointError, "int32"),
    "no tensors": (tensors(lambda s: s.clear()), CheckpointError, "has no tensors"),
    "a truncated file": (
        cut("adapter_model.safetensors", 5000), CheckpointError, "cannot be read",
    ),
    "an empty file": (cut("adapter_model.safetensors", 0), CheckpointError, "cannot be read"),
    "no file": (
        lambda f: (f / "adapter_model.safetensors").unlink(), CheckpointError, "adapter_model.bin",
    ),
    "damaged JSON": (cut("adapter_config.json", 20), CheckpointError, "cannot be read"),
    "a list as JSON": (
        lambda f: (f / "adapter_config.json").write_text("[]"), CheckpointError, "object",
    ),
    "DoRA": (options(use_dora=True), CheckpointError, "use_dora is True"),
    "another method": (options(peft_type="IA3"), CheckpointError, "peft_type is 'IA3'"),
    "trained biases": (options(bias="all"), CheckpointError, "bias is 'all'"),
    "modules to save": (options(modules_to_save=["lm_head"]), CheckpointError, "modules_to_save"),
    "some layers": (options(layers_to_transform=[0]), CheckpointError, "layers_to_transform"),
    "no r": (options(r="gone"), CheckpointError, "no 'r'"),
    "alpha is text": (options(lora_alpha="16"), CheckpointError, "scale.alpha is '16'"),
    "targets are a number": (options(target_modules=3), CheckpointError, "target_modules is 3"),
    "another base's targets": (options(target_modules=["wi"]), CheckpointError, "named wi"),
    "a pickle that was not allowed": (pickled(None, keep=True), OptionError, "allow_pickle=True"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD_RELEASED.values(), ids=BAD_RELEASED)
def test_refuses_released(
    make_base: MakeBase, tmp_path: Path, change: Change, error: type[EptcError], text: str
) -> None:
    base = make_base("llama")
    folder = write_released(trained(base, RELEASED), tmp_path / "adapter")
    load_reference(folder, base, top_k=2, tasks=NAMES)
    change(folder)
    with pytest.raises(error) as caught:
        load_reference(folder, base, top_k=2, tasks=NAMES)
    assert type(caught.value) is error
    assert_mentions(caught.value, text)


def assert_mentions(error: EptcError, text: str) -> None:
    assert re.search(text, str(error)), str(error)


BAD_PICKLES: dict[str, Change] = {
    "code": pickled(Path),
    "a list": pickled([torch.ones(1)]),
    "numbers": pickled({"a": 1}),
    "not a pickle": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
}


@pytest.mark.parametrize("change", BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_refuses_pickles(make_base: MakeBase, tmp_path: Path, change: Change) -> None:
    base = make_base("llama")
    folder = write_released(trained(base, RELEASED), tmp_path / "adapter")
    change(folder)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        load_reference(folder, base, top_k=2, tasks=NAMES, allow_pickle=True)


def test_refuses_what_the_folder_does_not_say(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama")
    folder = write_released(trained(base, RELEASED), tmp_path / "adapter")
    with pytest.raises(OptionError, match="how many experts"):
        load_reference(folder, base, tasks=NAMES)
    with pytest.raises(OptionError, match="name its tasks"):
        load_reference(folder, base, top_k=2)
    with pytest.raises(OptionError, match="9 tasks"):
        load_reference(folder, base, top_k=2, tasks=[f"t{i}" for i in range(9)])
    with pytest.raises(TaskError, match="listed twice"):
        load_reference(folder, base, top_k=2, tasks=["rte", "rte"])


HEAD = "heads.topic.classifier"
BAD_NATIVE: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (drop(f"{QUERY}.ept.A"), f"{QUERY} has no A"),
    "an extra part": (put(f"{QUERY}.ept.C", torch.ones(1)), "no place for C"),
    "a bias of the released code": (
        put(f"{QUERY}.ept.router.bias", torch.ones(3)), r"no place for router\.bias",
    ),
    "a stray tensor": (put("bert.weight", torch.ones(1)), r"without a place: bert\.weight"),
    "a shared tensor": (put("shared.ept.A", torch.ones(4, 30)), "tensors for shared"),
    "a misshapen kernel": (put(f"{QUERY}.ept.kernels.1", torch.ones(2, 3)), r"\[2, 3\]"),
    "a transposed A": (put(f"{QUERY}.ept.A", torch.ones(18, 4)), "4x18 or more"),
    "too few embeddings": (put(f"{QUERY}.ept.task_embedding", torch.ones(2, 36)), "3 or more x36"),
    "NaN": (put(f"{QUERY}.ept.B", torch.full((18, 4), math.nan)), "NaN"),
    "integers": (put(f"{QUERY}.ept.B", torch.ones(18, 4).long()), "int64"),
    "no head": (drop(f"{HEAD}.weight"), r"'topic' has no classifier\.weight"),
    "a head of another width": (put(f"{HEAD}.weight", torch.ones(2, 36)), r"\[2, 36\]"),
    "a head's unknown part": (put(f"{HEAD}.scale", torch.ones(1)), r"place for heads\.topic"),
    "a head of no task": (put("heads.other.classifier.bias", torch.ones(1)), "heads.other"),
    "a head of a module the base has not": (
        put("heads.topic.dense.weight", torch.ones(1)), "no module 'dense'",
    ),
    "a truncated file": (cut("ept_model.safetensors", 3000), "cannot be read"),
    "no tensors": (lambda f: (f / "ept_model.safetensors").unlink(), "has no ept_model"),
    "damaged JSON": (cut("ept_config.json", 100), "cannot be read"),
    "a newer schema": (options(schema_version=2), "schema_version is 2"),
    "another rank": (options(rank=5), "expected: 5x18"),
    "another expert": (options(kernel_sizes=[2, 3, 4, 4]), r"has no kernels\.3"),
    "another size": (options(kernel_sizes=[2, 3, 6]), "kernels.2 has the shape"),
    "fewer targets": (options(targets=["query"]), "has tensors for"),
    "more targets": (options(targets=["query", "key", "intermediate.dense"]), "no tensors for"),
    "shared A and B": (options(sharing="model"), "no place for [AB]"),
    "an override of nothing": (options(modules={"bert.x": {"rank": 2}}), r"names 'bert\.x'"),
    "a task that only generates": (
        options(tasks=[t.to_json() for t in (SENTIMENT, Task("topic", "generation"), SCORE)]),
        "'topic' is 'generation'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD_NATIVE.values(), ids=BAD_NATIVE)
def test_refuses_native(make_base: MakeBase, tmp_path: Path, change: Change, text: str) -> None:
    base = make_base()
    folder = tmp_path / "saved"
    trained(base, PLAIN).save(folder)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_reference(folder, base)
    assert_mentions(caught.value, text)


def test_refuses_folders(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_reference(tmp_path, base)
    folder = write_released(trained(base, RELEASED), tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError) as caught:
        load_reference(tmp_path, base)
    assert_mentions(caught.value, "checkpoint-9")
    load_reference(folder, base, top_k=2, tasks=NAMES).save(folder)
    with pytest.raises(CheckpointError, match=r"ept_config\.json and adapter_config\.json"):
        load_reference(folder, base)


def test_refuses_contradictions(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    trained(base, PLAIN).save(tmp_path / "saved")
    names = [task.name for task in PLAIN.tasks]
    load_reference(tmp_path / "saved", base, top_k=2, tasks=names)
    with pytest.raises(OptionError, match="top_k is 1"):
        load_reference(tmp_path / "saved", base, top_k=1)
    with pytest.raises(OptionError, match="the tasks are"):
        load_reference(tmp_path / "saved", base, tasks=names[::-1])


def test_refuses_bases(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    saved = tmp_path / "saved"
    trained(base, PLAIN).save(saved, base_dir=base)
    with pytest.raises(BaseModelError, match="SHA-256"):
        load_reference(saved, make_base(seed=1))
    trained(base, PLAIN).save(saved)
    with pytest.raises(BaseModelError, match="a 'roberta'"):
        load_reference(saved, make_base("roberta"))
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_reference(saved, tmp_path)
    stored = safetensors.torch.load_file(base / "model.safetensors")
    stored.pop("pooler.dense.bias")
    safetensors.torch.save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"no weights for bert\.pooler\.dense\.bias"):
        load_reference(saved, base)
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_reference(saved, base)
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_reference(saved, base)
    with pytest.raises(BaseModelError, match="cannot be read"):
        base_sha256(base)


def test_a_head_may_bring_what_the_base_lacks(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base()
    stored = safetensors.torch.load_file(base / "model.safetensors")
    kept = {name: t for name, t in stored.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="pooler"):
        load_base(base)
    hf_model = load_base(base, allow_missing=["bert.pooler"])
    model = EptModel.attach(hf_model, PLAIN, head_modules=["bert.pooler.dense"])
    model.save(tmp_path / "saved", base_dir=base)
    copy = load_reference(tmp_path / "saved", base)
    assert torch.equal(logits(copy, "topic"), logits(model.eval(), "topic"))


def test_a_cut_off_save_is_no_checkpoint(
    make_base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    model = trained(base, PLAIN)
    model.save(tmp_path / "saved")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            model.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_reference(tmp_path / "saved", base)
    model.save(tmp_path / "saved")
    load_reference(tmp_path / "saved", base)
