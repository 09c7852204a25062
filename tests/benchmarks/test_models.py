"""The models made on the fly: shapes, and the same bytes for the same seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.cases import Case, feeds
from benchmarks.models import MODELS, make
from benchmarks.places import Files


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, Any]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.fixture(scope="module", params=["tiny-bert", "tiny-t5", "tiny-llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("models") / request.param)
    make(MODELS[request.param], files)
    return files


def test_a_seed_makes_the_same_bytes(made: Files, tmp_path: Path) -> None:
    model = MODELS[made.root.name]
    make(model, Files(tmp_path / "same"))
    assert tree(tmp_path / "same") == tree(made.root)
    make(model, Files(tmp_path / "other"), seed=1)
    same = weights(tmp_path / "other" / "checkpoint")
    for name, tensor in weights(made.checkpoint).items():
        assert same[name].shape == tensor.shape
        assert not np.array_equal(same[name], tensor), name


def test_every_target_has_an_adapter(made: Files) -> None:
    names = weights(made.checkpoint)
    paths = {name.partition(".ept.")[0] for name in names if ".ept." in name}
    # Query, key and value; 4 linears an attention and 2 a feed-forward, two encoder
    # layers and one of the decoder; 7 for each of 2 layers.
    expected = {"tiny-bert": 3, "tiny-t5": 2 * (4 + 2) + (4 + 4 + 2), "tiny-llama": 2 * 7}
    assert len(paths) == expected[made.root.name]


def test_the_zero_checkpoint_differs_in_b_alone(made: Files) -> None:
    given, zero = weights(made.checkpoint), weights(made.zero)
    for name, tensor in given.items():
        expected = np.zeros_like(tensor) if name.endswith(".B") else tensor
        assert np.array_equal(zero[name], expected), name


def test_the_merged_model_is_the_base_moved(made: Files) -> None:
    """Adapted weights move by a fraction of themselves, all others not at all."""
    base, merged = weights(made.base), weights(made.merged)
    adapted = {
        f"{name.partition('.ept.')[0]}.weight"
        for name in weights(made.checkpoint)
        if ".ept." in name
    }
    assert adapted <= set(merged)
    for name, tensor in merged.items():
        if name.startswith("classifier."):  # the head is the task's own
            continue
        before = base[name].astype(np.float32)
        moved = float(np.abs(tensor - before).max())
        largest = float(np.abs(before).max())
        assert (0 < moved < 3 * largest) if name in adapted else moved == 0, name


def test_streamed_weights_are_of_the_size_of_trained_ones(tmp_path: Path) -> None:
    files = Files(tmp_path / "tiny-llama")
    make(MODELS["tiny-llama"], files)
    found = weights(files.base)
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float16)}
    matrix = found["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    assert matrix.shape == (48, 32)
    assert 0.01 < matrix.std() < 0.05
    assert abs(matrix.mean()) < 0.005
    assert (found["model.norm.weight"] == 1).all()
    index = json.loads((files.base / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(found)
    assert len(set(index.values())) == 5  # two layers, embedding, norm, head


def test_feeds_fit_the_vocabulary(made: Files) -> None:
    kind: Any = "classify" if made.root.name == "tiny-bert" else "generate"
    case = Case("x", made.root.name, kind, batch=3, length=50)
    inputs = feeds(case, made)
    assert ("token_type_ids" in inputs) == (made.root.name == "tiny-bert")
    for array in inputs.values():
        assert (array.shape, array.dtype) == ((3, 50), np.int64)
    assert inputs["input_ids"].min() >= 32
    assert inputs["input_ids"].max() < 64
    assert inputs["attention_mask"].all()
