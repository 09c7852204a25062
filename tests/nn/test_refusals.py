"""Checkpoints and bases that are refused, and what the error says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from eptc.errors import BaseModelError, CheckpointError, EptcError, OptionError, TaskError
from eptc.nn import (
    EptConfig,
    EptModel,
    base_sha256,
    load_reference,
)

MakeBase = Callable[..., Path]
Trained = Callable[..., EptModel]
WriteReleased = Callable[..., Path]

QUERY = "bert.encoder.layer.1.attention.self.query"
NAMES = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.self_attn.q_proj"

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
    "another rank": (options(r=6), CheckpointError, "expected: 6 x 16"),
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
    "no r": (options(r="gone"), CheckpointError, "no 'r'"),
    "alpha is text": (options(lora_alpha="16"), CheckpointError, "scale.alpha is '16'"),
    "targets are a number": (options(target_modules=3), CheckpointError, "target_modules is 3"),
    "another base's targets": (options(target_modules=["wi"]), CheckpointError, "named wi"),
    "a pickle that was not allowed": (pickled(None, keep=True), OptionError, "allow_pickle=True"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD_RELEASED.values(), ids=BAD_RELEASED)
def test_refuses_released(
    make_base: MakeBase,
    tmp_path: Path,
    change: Change,
    error: type[EptcError],
    text: str,
    trained: Trained,
    write_released: WriteReleased,
    released: EptConfig,
) -> None:
    base = make_base("llama")
    folder = write_released(trained(base, released), tmp_path / "adapter")
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
def test_refuses_pickles(
    make_base: MakeBase,
    tmp_path: Path,
    change: Change,
    trained: Trained,
    write_released: WriteReleased,
    released: EptConfig,
) -> None:
    base = make_base("llama")
    folder = write_released(trained(base, released), tmp_path / "adapter")
    change(folder)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        load_reference(folder, base, top_k=2, tasks=NAMES, allow_pickle=True)


def test_refuses_what_the_folder_does_not_say(
    make_base: MakeBase,
    tmp_path: Path,
    trained: Trained,
    write_released: WriteReleased,
    released: EptConfig,
) -> None:
    base = make_base("llama")
    folder = write_released(trained(base, released), tmp_path / "adapter")
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
    "a transposed A": (put(f"{QUERY}.ept.A", torch.ones(18, 4)), "4 x 18 or more"),
    "too few embeddings": (
        put(f"{QUERY}.ept.task_embedding", torch.ones(2, 36)), "3 or more x 36",
    ),
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
    "another rank": (options(rank=5), "expected: 5 x 18"),
    "another expert": (options(kernel_sizes=[2, 3, 4, 4]), r"has no kernels\.3"),
    "another size": (options(kernel_sizes=[2, 3, 6]), "kernels.2 has the shape"),
    "fewer targets": (options(targets=["query"]), "has tensors for"),
    "more targets": (options(targets=["query", "key", "intermediate.dense"]), "no tensors for"),
    "shared A and B": (options(sharing="model"), "no place for [AB]"),
    "an override of nothing": (options(modules={"bert.x": {"rank": 2}}), r"names 'bert\.x'"),
    "a task that only generates": (
        options(
            tasks=[{"name": n, "kind": "generation"} for n in ("topic", "score", "sentiment")]
        ),
        "'topic' is 'generation'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD_NATIVE.values(), ids=BAD_NATIVE)
def test_refuses_native(
    make_base: MakeBase,
    tmp_path: Path,
    change: Change,
    text: str,
    trained: Trained,
    plain: EptConfig,
) -> None:
    base = make_base()
    folder = tmp_path / "saved"
    trained(base, plain).save(folder)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load_reference(folder, base)
    assert_mentions(caught.value, text)


def test_refuses_folders(
    make_base: MakeBase,
    tmp_path: Path,
    trained: Trained,
    write_released: WriteReleased,
    released: EptConfig,
) -> None:
    base = make_base("llama")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_reference(tmp_path, base)
    folder = write_released(trained(base, released), tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError) as caught:
        load_reference(tmp_path, base)
    assert_mentions(caught.value, "checkpoint-9")
    load_reference(folder, base, top_k=2, tasks=NAMES).save(folder)
    with pytest.raises(CheckpointError, match=r"ept_config\.json and adapter_config\.json"):
        load_reference(folder, base)


def test_refuses_contradictions(
    make_base: MakeBase, tmp_path: Path, trained: Trained, plain: EptConfig
) -> None:
    base = make_base()
    trained(base, plain).save(tmp_path / "saved")
    names = [task.name for task in plain.tasks]
    load_reference(tmp_path / "saved", base, top_k=2, tasks=names)
    with pytest.raises(OptionError, match="top_k is 1"):
        load_reference(tmp_path / "saved", base, top_k=1)
    with pytest.raises(OptionError, match="the tasks are"):
        load_reference(tmp_path / "saved", base, tasks=names[::-1])


def test_refuses_bases(
    make_base: MakeBase, tmp_path: Path, trained: Trained, plain: EptConfig
) -> None:
    base = make_base()
    saved = tmp_path / "saved"
    trained(base, plain).save(saved, base_dir=base)
    with pytest.raises(BaseModelError, match="SHA-256"):
        load_reference(saved, make_base(seed=1))
    trained(base, plain).save(saved)
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
