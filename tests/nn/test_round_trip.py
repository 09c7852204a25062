"""The native format: saved and loaded again, for every rule and kind of base."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from eptc.errors import BaseModelError, CheckpointError
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
Trained = Callable[..., EptModel]

QUERY = "bert.encoder.layer.1.attention.self.query"


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
    "token": {"gate": GateConfig("token")},
    "token and task": {"gate": GateConfig("token+task", 1.5, "softmax"), "sharing": "model"},
    "no normalization": {"gate": GateConfig("task", 0.5, "none"), "top_k": 1},
    "overrides": {"variant": "released", "modules": {QUERY: ModuleConfig(rank=6, alpha=3)}},
}


@pytest.mark.parametrize("changes", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip(
    make_base: MakeBase,
    tmp_path: Path,
    changes: dict[str, Any],
    trained: Trained,
    plain: EptConfig,
) -> None:
    """Saved and loaded: equal to the bit, configuration too; saved again: equal files."""
    base = make_base()
    model = trained(base, dataclasses.replace(plain, **{"gate": None, **changes}))
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


def test_names_in_the_file(
    make_base: MakeBase, tmp_path: Path, trained: Trained, plain: EptConfig
) -> None:
    trained(make_base(), plain, head_modules=("bert.pooler.dense",)).save(tmp_path)
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
def test_other_models(
    make_base: MakeBase, tmp_path: Path, kind: str, trained: Trained, plain: EptConfig
) -> None:
    base = make_base(kind)
    targets = {"roberta": ("key",), "t5": ("q", "wi"), "llama": ("v_proj", "gate_proj")}[kind]
    tasks = plain.tasks[::2] if kind == "roberta" else (GLUE["rte"], Task("free", "generation"))
    model = trained(base, dataclasses.replace(plain, targets=targets, tasks=tasks))
    model.save(tmp_path / "saved", base_dir=base)
    copy = load_reference(tmp_path / "saved", base)
    for task in tasks:
        assert torch.equal(logits(copy, task.name), logits(model, task.name))
    if kind == "roberta":
        assert logits(copy, "score").shape == (2, 1)
        assert "heads.score.classifier.dense.weight" in safetensors.torch.load_file(
            tmp_path / "saved" / "ept_model.safetensors"
        )


def test_larger_tensors_and_other_floats(
    make_base: MakeBase, tmp_path: Path, trained: Trained, plain: EptConfig
) -> None:
    """A and B may be wider than the largest crop, embeddings may have spare rows."""
    base = make_base()
    model = trained(base, plain)
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


def test_a_head_may_bring_what_the_base_lacks(
    make_base: MakeBase, tmp_path: Path, plain: EptConfig
) -> None:
    base = make_base()
    stored = safetensors.torch.load_file(base / "model.safetensors")
    kept = {name: t for name, t in stored.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="pooler"):
        load_base(base)
    hf_model = load_base(base, allow_missing=["bert.pooler"])
    model = EptModel.attach(hf_model, plain, head_modules=["bert.pooler.dense"])
    model.save(tmp_path / "saved", base_dir=base)
    copy = load_reference(tmp_path / "saved", base)
    assert torch.equal(logits(copy, "topic"), logits(model.eval(), "topic"))


def test_a_cut_off_save_is_no_checkpoint(
    make_base: MakeBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Trained,
    plain: EptConfig,
) -> None:
    base = make_base()
    model = trained(base, plain)
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


def test_a_head_of_the_base_is_kept(
    make_base: MakeBase, tmp_path: Path, trained: Trained, plain: EptConfig
) -> None:
    """Where the base has a head of a task's width, that task need not bring one."""
    base = make_base("bert-classifier")
    stored = safetensors.torch.load_file(base / "model.safetensors")
    model = EptModel.attach(load_base(base), plain)
    two, three = (model.heads["classifier"].tasks[i].get_parameter("weight") for i in (0, 1))
    assert torch.equal(two, stored["classifier.weight"])
    assert three.shape == (3, 36)
    trained(base, plain).save(tmp_path)
    path = tmp_path / "ept_model.safetensors"
    kept = safetensors.torch.load_file(path)
    del kept["heads.sentiment.classifier.weight"]
    safetensors.torch.save_file(kept, path)
    copy = load_reference(tmp_path, base)
    kept_head = copy.heads["classifier"].tasks[0].get_parameter("weight")
    assert torch.equal(kept_head, stored["classifier.weight"])
