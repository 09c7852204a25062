"""The reference against outputs recorded from the original code, every stored batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from eptc.nn.mept import MeptModel, PromptSite

SETS = (
    "mept-t5-top2",
    "mept-t5-top1-partial",
    "mept-llama-cls",
    "mept-llama-stochastic",
    "smop-t5",
)
BATCHES = range(9)
ATOL = 2e-5


class Recorded(NamedTuple):
    folder: Path
    model: MeptModel
    arrays: dict[str, np.ndarray]

    def tensors(self, batch: int, *names: str) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(self.arrays[f"b{batch}_{name}"]) for name in names}

    def sites(self) -> dict[str, PromptSite]:
        found = {f"block{number}": site for number, site in self.model.blocks.items()}
        assert self.model.input is not None
        return {"input": self.model.input, **found}


@pytest.fixture(scope="module", params=SETS)
def recorded(request: pytest.FixtureRequest, golden: Path) -> Recorded:
    folder = golden / "mept" / request.param
    model = MeptModel.load(folder / "checkpoint", folder / "base", allow_pickle=True)
    with np.load(folder / "golden.npz") as file:
        return Recorded(folder, model, dict(file))


def worst(found: torch.Tensor, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found.detach().numpy() - wanted).max())


@pytest.mark.parametrize("batch", BATCHES)
def test_answers(recorded: Recorded, batch: int) -> None:
    names = ["input_ids", "attention_mask"]
    if f"b{batch}_labels" in recorded.arrays:
        names.append("labels")
    with torch.no_grad():
        output = recorded.model.hf(**recorded.tensors(batch, *names))
    assert worst(output.logits, recorded.arrays[f"b{batch}_logits"]) <= ATOL
    if "labels" in names:
        hidden = recorded.arrays[f"b{batch}_encoder_last_hidden_state"]
        assert worst(output.encoder_last_hidden_state, hidden) <= ATOL
        assert worst(output.loss, recorded.arrays[f"b{batch}_loss"]) <= ATOL


@pytest.mark.parametrize("batch", BATCHES)
def test_sites(recorded: Recorded, batch: int) -> None:
    """What each router reads, its probabilities, its prompts, and the blocks around them."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    blocks: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return lambda _module, args, prompts: seen.update({name: (args[0], prompts)})

    def keep(name: str) -> Any:
        return lambda _module, _args, out: blocks.update({name: out})

    hooks = [s.register_forward_hook(watch(n)) for n, s in recorded.sites().items()]
    hf = recorded.model.hf
    stack = hf.encoder.block if hf.config.model_type == "t5" else hf.model.layers
    hooks += [b.register_forward_hook(keep(f"block{i}")) for i, b in enumerate(stack)]
    inputs = recorded.tensors(batch, "input_ids", "attention_mask")
    try:
        with torch.no_grad():
            hf.encoder(**inputs) if hf.config.model_type == "t5" else hf(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    checked = 0
    for name, site in recorded.sites().items():
        query, prompts = seen[name]
        if name == "input" and hf.config.model_type == "t5" and len(prompts) == site.length:
            prompts = prompts.transpose(0, 1)  # Recorded after the rows changed places.
        wanted = {
            what: recorded.arrays.get(f"b{batch}_{name}_{what}")
            for what in ("sentence", "probs", "prompts")
        }
        if site.stochastic:
            wanted["sentence"] = wanted["probs"] = None  # The original computes neither.
        for what, value in wanted.items():
            if value is None:
                continue
            with torch.no_grad():
                found = {
                    "sentence": query, "probs": site.probabilities(query), "prompts": prompts
                }[what]  # fmt: skip
            assert worst(found, value) <= ATOL, (name, what)
            checked += 1
    for name, value in recorded.arrays.items():
        if name.startswith(f"b{batch}_block") and name.endswith("_out"):
            found = blocks[name.removeprefix(f"b{batch}_").removesuffix("_out")]
            found = found[0] if isinstance(found, tuple) else found
            assert worst(found, value) <= ATOL, name
            checked += 1
    assert checked


def test_routes(recorded: Recorded) -> None:
    """The experts of every row at every site, in their order."""
    manifest = json.loads((recorded.folder / "manifest.json").read_text())
    sites, checked = recorded.sites(), 0
    for entry in manifest["batches"]:
        for name, wanted in entry["routes"].items():
            site = sites[name.removesuffix("_probs")]
            sentence = recorded.arrays[f"b{entry['batch']}_{name.replace('probs', 'sentence')}"]
            with torch.no_grad():
                p = site.probabilities(torch.from_numpy(sentence))
            assert p.topk(site.top_k).indices.tolist() == wanted
            checked += 1
    assert checked or next(iter(sites.values())).stochastic


@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_tokens(recorded: Recorded, rows: int) -> None:
    if f"gen{rows}_sequences" not in recorded.arrays:
        assert recorded.model.hf.config.model_type == "llama"
        return
    inputs = {
        name: torch.from_numpy(recorded.arrays[f"gen{rows}_{name}"])
        for name in ("input_ids", "attention_mask")
    }
    with torch.no_grad():
        tokens = recorded.model.hf.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert tokens.tolist() == recorded.arrays[f"gen{rows}_sequences"].tolist()


@pytest.mark.parametrize("name", ["mept-t5-top1-partial", "mept-llama-cls", "smop-t5"])
def test_per_sample_rows_are_what_each_gets_alone(golden: Path, name: str) -> None:
    folder = golden / "mept" / name
    faithful, alone = (
        MeptModel.load(folder / "checkpoint", folder / "base", mode=mode, allow_pickle=True)
        for mode in ("batch", "per-sample")
    )
    with np.load(folder / "golden.npz") as file:
        # As many rows as a row has prompts.
        rows = 3 if "t5" in name else 4
        ids = torch.from_numpy(file["b8_input_ids"][:rows])
        mask = torch.from_numpy(file["b8_attention_mask"][:rows])
    extra = {"decoder_input_ids": torch.zeros(rows, 1, dtype=torch.int64)} if "t5" in name else {}
    with torch.no_grad():
        together = alone.hf(input_ids=ids, attention_mask=mask, **extra).logits
        for row in range(rows):
            one = {k: v[row : row + 1] for k, v in extra.items()}
            single = faithful.hf(
                input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **one
            ).logits
            assert worst(together[row : row + 1], single.numpy()) <= ATOL
        mixed = faithful.hf(input_ids=ids, attention_mask=mask, **extra).logits
    assert worst(mixed, together.numpy()) > 1e-2


def test_what_was_trained_on_its_base_is_the_same_model(golden: Path, tmp_path: Path) -> None:
    folder = golden / "mept" / "mept-t5-top2"
    for name in ("adapter_config.json", "train_args.json", "trainable_only.bin"):
        (tmp_path / name).write_bytes((folder / "checkpoint" / name).read_bytes())
    whole = MeptModel.load(folder / "checkpoint", folder / "base", allow_pickle=True)
    parts = MeptModel.load(tmp_path, folder / "base", allow_pickle=True)
    with np.load(folder / "golden.npz") as file:
        inputs = {
            name: torch.from_numpy(file[f"b2_{name}"])
            for name in ("input_ids", "attention_mask", "decoder_input_ids")
        }
    with torch.no_grad():
        assert torch.equal(parts.hf(**inputs).logits, whole.hf(**inputs).logits)
