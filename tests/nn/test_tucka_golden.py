"""TuckA: the reference gives what the authors' own code gave, over every recorded batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eptc.nn.base import read_base
from eptc.nn.tucka import Routing, TuckaModel
from eptc.tasks import Task

CLASSIFIERS = ["roberta-cls", "bert-cls", "deberta-cls", "roberta-k1-wrapped-head"]
SETS = [*CLASSIFIERS, "llama-lm"]
BATCHES = range(9)
TASK = Task("default", "generation")
ATOL = 2e-5

Load = Callable[..., TuckaModel]


@pytest.fixture(scope="session")
def tucka(golden: Path) -> Load:
    loaded: dict[tuple[str, Routing], TuckaModel] = {}

    def load(name: str, routing: Routing = "batch") -> TuckaModel:
        if (name, routing) not in loaded:
            folder = golden / "tucka" / name
            model = TuckaModel.load(
                folder / "checkpoint", folder / "base", task=TASK, routing=routing
            )
            loaded[name, routing] = model
        return loaded[name, routing]

    return load


@pytest.fixture(scope="session")
def recorded(golden: Path) -> Callable[[str], dict[str, np.ndarray]]:
    return lambda name: dict(np.load(golden / "tucka" / name / "golden.npz"))


def feeds(arrays: dict[str, Any], batch: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(arrays[f"{batch}_{name}"])
        for name in ("input_ids", "attention_mask")
    }


@pytest.mark.parametrize("name", SETS)
def test_logits_and_routes(tucka: Load, recorded: Any, name: str) -> None:
    model, arrays = tucka(name), recorded(name)
    for batch in (f"b{i}" for i in BATCHES):
        with model.recording() as calls, torch.no_grad():
            found = model.hf(**feeds(arrays, batch)).logits.numpy()
        np.testing.assert_allclose(found, arrays[f"{batch}_logits"], rtol=0, atol=ATOL)
        endings = ["", *(f"_call{i}" for i in range(1, len(calls)))]
        assert f"{batch}_route_group_call{len(calls)}" not in arrays
        for (group, weights), ending in zip(calls, endings, strict=True):
            assert group.tolist() == [int(arrays[f"{batch}_route_group{ending}"])]
            wanted = arrays[f"{batch}_route_weights{ending}"]
            np.testing.assert_allclose(weights[0].numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_inputs_and_outputs_of_linears(
    tucka: Load, recorded: Any, golden: Path, name: str
) -> None:
    model, arrays = tucka(name), recorded(name)
    manifest = json.loads((golden / "tucka" / name / "manifest.json").read_text())
    watched = [path for path in manifest["watched_layers"] if path in model.layers]
    assert len(watched) >= 2
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    hooks = [
        model.layers[path].register_forward_hook(
            lambda _, x, y, number=number: seen.append((number, x[0], y))
        )
        for number, path in enumerate(watched)
    ]
    for batch in ("b0", "b2", "b8"):
        seen.clear()
        with torch.no_grad():
            model.hf(**feeds(arrays, batch))
        counts = dict.fromkeys(range(len(watched)), 0)
        for number, x, y in seen:
            call = f"_call{counts[number]}" if counts[number] else ""
            counts[number] += 1
            for what, tensor in (("in", x), ("out", y)):
                wanted = arrays[f"{batch}_layer{number}{call}_{what}"]
                np.testing.assert_allclose(tensor.numpy(), wanted, rtol=0, atol=ATOL)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("which", ["gen", "gen1"])
def test_generation_with_a_cache(tucka: Load, recorded: Any, which: str) -> None:
    """The router runs at every step; keys and values stay as older routes made them."""
    model, arrays = tucka("llama-lm"), recorded("llama-lm")
    wanted = arrays[f"{which}_sequences"]
    new = wanted.shape[1] - arrays[f"{which}_input_ids"].shape[1]
    with model.recording() as calls, torch.no_grad():
        output: Any = model.hf.generate(
            **feeds(arrays, which), max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    assert output.sequences.tolist() == wanted.tolist()
    logits = torch.stack(output.logits, 1).numpy()
    np.testing.assert_allclose(logits, arrays[f"{which}_step_logits"], rtol=0, atol=5e-5)
    assert [int(group) for group, _ in calls] == arrays[f"{which}_route_group"].tolist()


@pytest.mark.parametrize("name", SETS)
def test_per_sample_is_batch_of_one(tucka: Load, recorded: Any, name: str) -> None:
    """A row's answer no longer depends on the others, but still on its own padding."""
    model, faithful, arrays = tucka(name, "per-sample"), tucka(name), recorded(name)
    given = feeds(arrays, "b8")
    with torch.no_grad():
        together = model.hf(**given).logits
        alone = [
            faithful.hf(**{key: value[i : i + 1] for key, value in given.items()}).logits
            for i in range(len(given["input_ids"]))
        ]
        coupled = faithful.hf(**given).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=ATOL)
    assert (together - coupled).abs().max() > 1e-3


@pytest.mark.parametrize("name", SETS)
def test_plain_names_are_those_of_the_task_model(tucka: Load, golden: Path, name: str) -> None:
    plain, _ = read_base(golden / "tucka" / name / "base")
    model = tucka(name)
    found = {
        own: p.shape for n, p in model.hf.named_parameters() if (own := model.plain_name(n, 0))
    }
    assert found == {n: p.shape for n, p in plain.named_parameters()}


@pytest.mark.parametrize("name", SETS)
def test_constant_routes(tucka: Load, recorded: Any, name: str) -> None:
    """DeBERTa alone calls its router again, on its table of positions: from there on it is set."""
    model, arrays = tucka(name), recorded(name)
    dynamic = {path for path, layer in model.layers.items() if not layer.folds}
    if name != "deberta-cls":
        assert dynamic == set(model.layers)
        return
    attention = "deberta.encoder.layer.0.attention.self"
    assert dynamic == {f"{attention}.query_proj", f"{attention}.value_proj"}
    layer = model.layers["pooler.dense"]
    x = torch.from_numpy(arrays["b2_layer2_in"])
    assert layer.bias is not None
    folded = x @ (layer.weight + layer.dense()).T + layer.bias
    torch.testing.assert_close(
        folded.detach(), torch.from_numpy(arrays["b2_layer2_out"]), rtol=0, atol=ATOL
    )
