"""TuckA folders: what their tensors mean, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from eptc import checkpoint
from eptc.errors import CheckpointError, EptcError, OptionError
from eptc.nn.tucka import TuckaModel
from eptc.tasks import Task

SITE = "bert.encoder.layer.0.attention.self.query"
PREFIX = f"base_model.model.{SITE}.tucka_"
FILE = "adapter_model.safetensors"

Tensors = dict[str, np.ndarray[Any, Any]]
Write = Callable[..., Any]


def edit(folders: Any, change: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Change a checkpoint's tensors and configuration."""
    path, config_path = folders.ckpt / FILE, folders.ckpt / "adapter_config.json"
    tensors, config = safetensors.numpy.load_file(path), json.loads(config_path.read_text())
    change(tensors, config)
    safetensors.numpy.save_file(tensors, path)
    config_path.write_text(json.dumps(config))


def read(folders: Any, **options: Any) -> checkpoint.Checkpoint:
    return checkpoint.read(folders.ckpt, folders.base, **options)


def test_branches_are_the_edits_of_the_input(write_tucka: Write) -> None:
    """Branches are W (x + alpha U^ M^T U^T^ x) - W x, each group's slices over their norm."""
    folders = write_tucka()
    source = read(folders)
    tensors = safetensors.numpy.load_file(folders.ckpt / FILE)
    rng = np.random.default_rng(0)
    assert len(source.model.adapters) == 11
    for path, adapter in source.model.adapters.items():
        g, c, u = (
            tensors[f"base_model.model.{path}.tucka_{part}"].astype(np.float64) for part in "gcu"
        )
        c, u = c / np.linalg.norm(c), u / np.linalg.norm(u)
        gates = rng.standard_normal(6)
        mixed = sum(
            gates[2 * group + slot]
            * np.einsum("q,qij->ij", c[slot], g[group] / np.linalg.norm(g[group]))
            for group in range(3)
            for slot in range(2)
        )
        weight = source.base.weights[f"{path}.weight"].numpy().astype(np.float64)
        wanted = 6.0 * weight @ u @ mixed.T @ u.T
        x = rng.standard_normal((5, weight.shape[1]))
        factors = adapter.factors(None, tuple(gates))
        parts = list(zip(factors, adapter.branches, strict=True))
        dense = sum(factor * branch.delta.dense() for factor, branch in parts)
        np.testing.assert_allclose(dense, wanted, rtol=1e-12, atol=1e-12)
        products = [(factor, *branch.delta.factors()) for factor, branch in parts]
        applied = sum(factor * (x @ v.T) @ u.T for factor, u, v in products)
        np.testing.assert_allclose(applied, x @ wanted.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("routing", "mode"), [("exact", "batch"), ("per-sample", "per-sample")])
def test_what_it_says_of_itself(write_tucka: Write, routing: Any, mode: str) -> None:
    source = read(write_tucka(), routing=routing)
    contents = source.contents
    (task,) = contents.tasks
    assert (contents.format, task.name, task.kind) == ("tucka", "default", "classification")
    assert task.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert set(contents.heads["default"]) == {"classifier.weight", "classifier.bias"}
    assert contents.routing.mode == mode
    assert contents.routing.reads_padding
    assert contents.details["tucka"] == {
        "r": 4, "k": 3, "t": 2, "p": 2, "alpha": 6.0, "router": SITE, "inert": [],
    }  # fmt: skip
    assert contents.notes == ()


def test_padding_does_not_move_deberta(write_tucka: Write) -> None:
    assert not read(write_tucka("deberta-v2")).contents.routing.reads_padding


def test_gates(write_tucka: Write) -> None:
    """The group of the best score keeps its scores; all positions and rows count."""
    folders = write_tucka()
    centroids = safetensors.numpy.load_file(folders.ckpt / FILE)[f"{PREFIX}ec"].astype(np.float64)
    x = np.random.default_rng(3).standard_normal((4, 7, 24))
    for routing, means in (("batch", x.mean((0, 1))[None]), ("per-sample", x.mean(1))):
        router = read(folders, routing=routing).model.adapters[SITE].input_router
        assert router is not None
        found = router.gates(x)
        assert found.shape == (len(means), 1, 6)
        for mean, gates in zip(means, found, strict=True):
            logits = (centroids @ mean).reshape(3, 2)
            scores = 1 / (1 + np.exp(-logits / np.linalg.norm(logits, axis=1, keepdims=True)))
            group = int(scores.argmax()) // 2
            wanted = np.zeros((3, 2))
            wanted[group] = scores[group]
            np.testing.assert_allclose(gates[0], wanted.ravel(), rtol=1e-12, atol=0)


def swap(name: str, array: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        tensors[name] = np.asarray(array, np.float32)

    return change


def drop(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, _: dict[str, Any]) -> None:
        del tensors[name]

    return change


def other_router(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[PREFIX.replace("query", "value") + "ec"] = tensors[f"{PREFIX}ec"]


def in_the_head(tensors: Tensors, _: dict[str, Any]) -> None:
    for part in "gcu":
        head = f"base_model.model.classifier.dense.tucka_{part}"
        tensors[head] = tensors[f"{PREFIX}{part}"]


def wider(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[f"{PREFIX}u"] = np.ones((25, 4), np.float32)


HEAD = "base_model.model.classifier."
DRAWN = np.random.default_rng(0).standard_normal((6, 24))
SMALL_GROUP = np.repeat([[1.0], [1e-24], [1.0]], 2, axis=0)
ZERO_GROUP = np.stack([np.ones((2, 4, 4)), np.zeros((2, 4, 4)), np.ones((2, 4, 4))])
HALF_EMPTY = np.r_[np.ones((4, 24)), np.zeros((2, 24))]
REFUSED: dict[str, tuple[Callable[[Tensors, dict[str, Any]], None], str]] = {
    "balancing": (lambda _, config: config.update(use_alb=True), "use_alb"),
    "other type": (lambda _, config: config.update(peft_type="LORA"), "peft_type|plain LoRA"),
    "no groups": (lambda _, config: config.update(k=0), "k = 0"),
    "half a rank": (lambda _, config: config.update(r=4.5), "r = 4.5"),
    "words for numbers": (lambda _, config: config.update(r="x"), "sound r, k, t, p"),
    "no router": (drop(f"{PREFIX}ec"), "0 routers"),
    "two routers": (other_router, "2 routers"),
    "not run, infinite": (swap(f"{PREFIX}ec", np.full((6, 24), np.inf)), "before the first"),
    "not run, zeros": (swap(f"{PREFIX}ec", HALF_EMPTY), "before the first"),
    "wrong number of groups": (lambda _, config: config.update(k=2), "says k = 2, and"),
    "groups for experts": (lambda _, config: config.update(k=6, t=1), "says k = 6|says t = 1"),
    "wrong number of slices": (lambda _, config: config.update(p=3), "says p = 3, and"),
    "wrong rank": (lambda _, config: config.update(r=8), "says r = 8, and"),
    "wrong number of axes": (swap(f"{PREFIX}u", np.ones(24)), "2 axes, and .*tucka_u"),
    "not run, denormal": (swap(f"{PREFIX}ec", DRAWN * 1e-42), "before the first"),
    "not run, tiny group": (swap(f"{PREFIX}ec", DRAWN * SMALL_GROUP), "before the first"),
    "not run, huge": (swap(f"{PREFIX}ec", DRAWN * 1e37), "before the first"),
    "not run, all the same": (swap(f"{PREFIX}ec", np.ones((6, 24))), "same centroid for all 6"),
    "lost part": (drop(f"{PREFIX}c"), "lacks .*tucka_c"),
    "zeros": (swap(f"{PREFIX}c", np.zeros((2, 2))), "all zeros"),
    "a group of zeros": (swap(f"{PREFIX}g", ZERO_GROUP), "tucka_g .* a norm that is 0"),
    "denormal": (swap(f"{PREFIX}u", np.full((24, 4), 1e-42)), "tucka_u .* a norm that is 0"),
    "overflow": (swap(f"{PREFIX}u", np.full((24, 4), 3e38)), "tucka_u .* infinite"),
    "not a number": (swap(f"{PREFIX}g", np.full((3, 2, 4, 4), np.nan)), "nan"),
    "another base": (wider, "does not fit"),
    "unknown part": (swap(f"{PREFIX}x", [1.0]), "no part of an adapter"),
    "unknown parameter": (swap("base_model.model.bert.x", [1.0]), "no parameter bert.x"),
    "head without bias": (drop(f"{HEAD}bias"), "lacks classifier.bias"),
    "head without weight": (drop(f"{HEAD}weight"), "lacks classifier.weight"),
    "adapter in the head": (in_the_head, "part of the saved head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(write_tucka: Write, name: str) -> None:
    change, message = REFUSED[name]
    folders = write_tucka()
    edit(folders, change)
    with pytest.raises(EptcError, match=message):
        read(folders, format="tucka")


@pytest.mark.parametrize("key", ["r", "k", "t", "p", "alpha"])
def test_what_changes_the_answers_is_not_guessed(write_tucka: Write, key: str) -> None:
    """Where a key is missing the authors' code takes one of its own, whatever was trained."""
    folders = write_tucka()
    edit(folders, lambda _, config: config.pop(key))
    with pytest.raises(CheckpointError, match=f"has no {key}\n.*\nto fix: add {key} to it"):
        read(folders)
    with pytest.raises(CheckpointError, match="r, k, t, p or alpha"):
        TuckaModel.load(folders.ckpt, folders.base, task=Task("default", "generation"))


def test_an_adapter_in_the_head_adds_nothing(write_tucka: Write) -> None:
    """With one group the copy of a head has a route of its own that stays at zero."""
    folders = write_tucka(k=1)
    edit(folders, in_the_head)
    contents = read(folders).contents
    assert "classifier.dense" not in contents.adapters
    assert contents.details["tucka"]["inert"] == ["classifier.dense"]
    assert "adds nothing" in contents.notes[0]


def test_groups_of_one_expert_are_reported(write_tucka: Write) -> None:
    assert "tie" in read(write_tucka(t=1)).contents.notes[0]
    assert read(write_tucka("bert", k=1, t=1)).contents.notes == ()


def test_a_lost_head_is_reported(write_tucka: Write) -> None:
    folders = write_tucka()
    edit(folders, drop("base_model.model.classifier.weight"))
    edit(folders, drop("base_model.model.classifier.bias"))
    assert "no classification head" in read(folders).contents.notes[0]


def test_a_part_of_a_head_is_refused_where_the_base_has_none(write_tucka: Write) -> None:
    folders = write_tucka()
    (path,) = folders.base.glob("*.safetensors")
    weights = safetensors.numpy.load_file(path)
    bare = {name: weight for name, weight in weights.items() if "classifier" not in name}
    safetensors.numpy.save_file(bare, path, metadata={"format": "pt"})
    assert set(read(folders).contents.heads["default"]) == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    edit(folders, drop(f"{HEAD}bias"))
    with pytest.raises(CheckpointError, match=r"lacks classifier\.bias"):
        read(folders)


def test_a_pickle_is_read_only_if_allowed(write_tucka: Write) -> None:
    folders = write_tucka()
    tensors = safetensors.numpy.load_file(folders.ckpt / FILE)
    wanted = read(folders).sha256
    (folders.ckpt / FILE).unlink()
    torch.save({n: torch.from_numpy(t) for n, t in tensors.items()},
               folders.ckpt / "adapter_model.bin")  # fmt: skip
    with pytest.raises(EptcError, match="pickle"):
        read(folders)
    assert read(folders, allow_pickle=True).sha256 == wanted


def test_labels_of_a_decoder_are_refused(write_tucka: Write, tmp_path: Path) -> None:
    folders = write_tucka("llama")
    spec = tmp_path / "tasks.json"
    task = Task("tone", "text-to-text", labels=("bad", "good"))
    spec.write_text(json.dumps([task.to_json()]))
    with pytest.raises(EptcError, match="scored all at once"):
        read(folders, task_spec=spec)


@pytest.mark.parametrize("kinds", [["c2p"], "c2p", None])
def test_a_route_that_a_dropped_projection_sets_is_refused(write_tucka: Write, kinds: Any) -> None:
    """DeBERTa projects its table of positions whether or not it reads what comes of it."""
    folders = write_tucka("deberta-v2")
    path = folders.base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pos_att_type": kinds}))
    with pytest.raises(EptcError, match="does not read them"):
        read(folders)
    path.write_text(json.dumps({**config, "pos_att_type": "c2p|p2c"}))
    read(folders)


def test_experts_are_not_chosen_by_task(write_tucka: Write) -> None:
    with pytest.raises(OptionError, match="--top-k 2"):
        read(write_tucka(), top_k=2)


def test_a_model_that_only_looks_merged_is_refused(golden: Path) -> None:
    folder = golden / "tucka" / "llama-lm"
    with pytest.raises(EptcError, match="nothing in it is merged"):
        checkpoint.read(folder / "merged_by_authors_code", folder / "base")
