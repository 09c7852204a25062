"""The reference against outputs recorded from the released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from eptc.nn import EptModel, load_reference
from eptc.nn.losses import contrastive_loss

SETS = ("t5-tiny", "t5-topk1", "t5-gated-tiny", "llama-tiny")
TASKS = range(8)


class Golden(NamedTuple):
    folder: Path
    meta: dict[str, Any]
    model: EptModel

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / "golden" / f"{name}.npz") as file:
            return dict(file)

    def tensors(self, task: int, *names: str) -> dict[str, torch.Tensor]:
        arrays = self.arrays(f"task{task}")
        return {name: torch.from_numpy(arrays[name]) for name in names}


@pytest.fixture(scope="module", params=SETS)
def recorded(request: pytest.FixtureRequest, golden: Path) -> Golden:
    folder = golden / "ept" / request.param
    meta = json.loads((folder / "meta.json").read_text())
    model = load_reference(
        folder / "adapter", folder / "base", top_k=meta["moe_top_k"], tasks=meta["tasks"]
    )
    return Golden(folder, meta, model)


def worst(found: torch.Tensor, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found.detach().numpy() - wanted).max())


def test_routes(recorded: Golden) -> None:
    """Every linear of every task: the same experts in the same order, the same weights."""
    routes = json.loads((recorded.folder / "golden" / "routes.json").read_text())
    assert routes["0"].keys() == recorded.model.layers.keys()
    for task in TASKS:
        for path, wanted in routes[str(task)].items():
            route = recorded.model.layers[path].route(task)
            assert list(route.experts) == wanted["experts"], (task, path)
            assert route.weights == pytest.approx(wanted["weights"], rel=0, abs=1e-7)
            probabilities = sorted(wanted["probs"], reverse=True)
            k = len(route.experts)
            margin = np.log(probabilities[k - 1]) - np.log(probabilities[k])
            assert route.margin == pytest.approx(margin, rel=0, abs=1e-5)


def test_layers(recorded: Golden) -> None:
    """The branch on the identity, its matrix, and whole layers on inputs of two and three axes."""
    arrays = recorded.arrays("layers")
    for path in recorded.meta["layers_npz"]:
        layer = recorded.model.layers[path]
        x2, x3 = (torch.from_numpy(arrays[f"{path}|{what}"]) for what in ("x2", "x3"))
        identity = torch.eye(layer.in_features)
        for task in TASKS:
            wanted = {what: arrays[f"{path}|{what}"][task] for what in ("dW", "y2", "y3")}
            assert worst(layer.delta(identity, task).T, wanted["dW"]) <= 1e-6
            assert worst(layer.dense(task), wanted["dW"]) <= 1e-6
            with recorded.model.task(task):
                assert worst(layer(x2), wanted["y2"]) <= 2e-5
                assert worst(layer(x3), wanted["y3"]) <= 2e-5
            loss = contrastive_loss(x3, layer.task_embedding, task)
            assert float(loss.detach()) == pytest.approx(
                arrays[f"{path}|cl_loss_x3"][task], rel=0, abs=1e-5
            )


@pytest.mark.parametrize("task", TASKS)
def test_logits_and_losses(recorded: Golden, task: int) -> None:
    check = check_llama if recorded.meta["arch"] == "llama" else check_t5
    with torch.no_grad():
        check(recorded, task)


def check_t5(recorded: Golden, task: int) -> None:
    arrays = recorded.arrays(f"task{task}")
    inputs = recorded.tensors(task, "input_ids", "attention_mask", "decoder_input_ids", "labels")
    output = recorded.model(task=task, **inputs)
    bound = 1e-4 if "gated" in recorded.folder.name else 5e-5  # |logits| up to 39 and 8
    assert worst(output.logits, arrays["logits"]) <= bound
    hidden = output.encoder_last_hidden_state
    assert worst(hidden, arrays["encoder_last_hidden_state"]) <= 2e-5
    assert worst(output.loss, arrays["loss"]) <= 1e-5
    assert worst(output.task_loss, arrays["ce_loss"]) <= 1e-5
    assert worst(output.contrastive_loss, arrays["encoder_cl_loss"]) <= 1e-5


def check_llama(recorded: Golden, task: int) -> None:
    """Logits where the mask is 1, of prompts (padded left) and of training rows (right)."""
    arrays = recorded.arrays(f"task{task}")
    for prefix in ("", "train_"):
        names = [f"{prefix}input_ids", f"{prefix}attention_mask"]
        ids, mask = recorded.tensors(task, *names).values()
        labels = torch.from_numpy(arrays["train_labels"]) if prefix else None
        output = recorded.model(task=task, input_ids=ids, attention_mask=mask, labels=labels)
        kept = mask.bool()
        assert worst(output.logits[kept], arrays[f"{prefix}logits"][kept.numpy()]) <= 5e-5
    assert worst(output.loss, arrays["loss"]) <= 1e-5
    assert output.contrastive_loss is None


@pytest.mark.parametrize("task", TASKS)
def test_generates_the_same_tokens(recorded: Golden, task: int) -> None:
    inputs = recorded.tensors(task, "input_ids", "attention_mask")
    with recorded.model.task(task), torch.no_grad():
        tokens = recorded.model.hf.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert tokens.tolist() == recorded.arrays(f"task{task}")["generated"].tolist()


def test_names_and_ids_are_the_same_task(recorded: Golden) -> None:
    x = torch.ones(1, recorded.model.layers[recorded.meta["layers_npz"][0]].in_features)
    layer = recorded.model.layers[recorded.meta["layers_npz"][0]]
    with recorded.model.task("sst2") as task_id:
        assert task_id == recorded.meta["task_ids"]["sst2"]
        assert torch.equal(layer.delta(x), layer.delta(x, 6))


def test_the_pickle_is_the_same_checkpoint(golden: Path) -> None:
    folder = golden / "ept" / "t5-tiny"
    names = json.loads((folder / "meta.json").read_text())["tasks"]
    one, two = (
        load_reference(folder / name, folder / "base", top_k=2, tasks=names, allow_pickle=True)
        for name in ("adapter", "adapter_bin")
    )
    state = two.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_a_native_copy_gives_equal_logits(recorded: Golden, tmp_path: Path) -> None:
    """Released folder -> native folder -> model: equal to the bit."""
    recorded.model.save(tmp_path, base_dir=recorded.folder / "base")
    copy = load_reference(tmp_path, recorded.folder / "base")
    inputs = recorded.tensors(3, "input_ids", "attention_mask")
    if recorded.meta["arch"] != "llama":
        inputs |= recorded.tensors(3, "decoder_input_ids")
    with torch.no_grad():
        wanted = recorded.model(task="qnli", **inputs).logits
        assert torch.equal(copy(task="qnli", **inputs).logits, wanted)
    assert copy.config == recorded.model.config
