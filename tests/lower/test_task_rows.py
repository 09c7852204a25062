"""Several tasks in one graph: each row has the answer its own task's graph gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from eptc import checkpoint, lower
from eptc.errors import CheckpointError
from eptc.fitting import task_config
from eptc.ir import AdaptedModel
from eptc.lower import insert_tasks
from eptc.passes.drop_dead_experts import DropDeadExperts
from eptc.passes.fold_pyramid import FoldPyramid
from eptc.passes.fold_transposes import FoldTransposes
from eptc.passes.specialize_router import SpecializeRouter
from eptc.passes.stable_names import StableNames
from eptc.passes.stack_tasks import StackTasks
from eptc.run_passes import run_graph_passes
from eptc.skeletons import skeleton
from eptc.tensors import Array, LazyTensor
from tests.conftest import Folders

PASSES = [FoldTransposes(), StableNames()]
Sessions = Mapping[str, onnxruntime.InferenceSession]


def _read(folders: Folders, **options: Any) -> checkpoint.Checkpoint:
    return checkpoint.read(folders.ckpt, folders.base, **options)


def _written(graphs: Mapping[str, Any], folder: Path) -> Sessions:
    run_graph_passes(graphs, PASSES)
    folder.mkdir()
    lower.write(graphs, folder)
    return {key: onnxruntime.InferenceSession(str(folder / f"{key}.onnx")) for key in graphs}


def _skeleton(source: checkpoint.Checkpoint, task_id: int) -> dict[str, Any]:
    found = skeleton(
        task_config(source, task_id), opset=20, tied_head=source.base.tied_head, prompts=None
    )
    return dict(found.copy_graphs())


def alone(source: checkpoint.Checkpoint, task_id: int, folder: Path) -> Sessions:
    """Return one task's own graphs, its branches folded."""
    model: AdaptedModel = source.model
    for step in (SpecializeRouter(task_id), DropDeadExperts(), FoldPyramid()):
        model = step.rewrite(model)
    graphs = _skeleton(source, task_id)
    lower.bind(graphs, model.weights)
    return _written(graphs, folder)


def together(
    source: checkpoint.Checkpoint,
    task_ids: Sequence[int],
    folder: Path,
    own: Mapping[str, LazyTensor] | None = None,
) -> Sessions:
    """Return the graphs of several tasks, `own` being each one's beside its head."""
    model = StackTasks(tuple(task_ids)).rewrite(source.model)
    model.validate()
    tasks = [source.contents.tasks[task_id] for task_id in task_ids]
    widest = max(task_ids, key=lambda t: source.contents.tasks[t].num_outputs)
    graphs = _skeleton(source, widest)
    heads = [{**source.contents.heads.get(task.name, {}), **(own or {})} for task in tasks]
    lower.bind(graphs, {**model.weights, **heads[list(task_ids).index(widest)]})
    for graph in graphs.values():
        insert_tasks(graph, model.adapters, heads, task_ids)
    return _written(graphs, folder)


def _close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


def test_each_row_has_its_own_task_and_head(small_native: Folders, tmp_path: Path) -> None:
    source = _read(small_native)
    chosen = [2, 0, 1]
    session = together(source, chosen, tmp_path / "all")["model"]
    rng = np.random.default_rng(0)
    places = np.array([0, 1, 2, 2, 0, 1, 1])
    feeds = {
        "input_ids": rng.integers(4, 17, (7, 9)),
        "attention_mask": np.tri(7, 9, 3, dtype=np.int64),
        "token_type_ids": np.zeros((7, 9), np.int64),
    }
    (got,) = session.run(None, {**feeds, "task_ids": places})
    assert got.shape == (7, 2)
    different = []
    for place, task_id in enumerate(chosen):
        (want,) = alone(source, task_id, tmp_path / str(task_id))["model"].run(None, feeds)
        rows = places == place
        _close(got[rows, : want.shape[1]], want[rows])
        assert not got[rows, want.shape[1] :].any()
        different.append(np.abs(got[~rows, : want.shape[1]] - want[~rows]).max())
    assert min(different) > 1e-2


@pytest.mark.parametrize("place", [-1, -3, 3, 2**40])
def test_a_task_that_is_not_there_is_an_error(
    small_native: Folders, tmp_path: Path, place: int
) -> None:
    session = together(_read(small_native), [0, 1, 2], tmp_path / "all")["model"]
    ones = np.ones((2, 3), np.int64)
    feeds = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ones)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.run(None, {**feeds, "task_ids": np.array([0, place])})


def test_an_adapted_linear_whose_bias_is_each_task_s_own_is_refused(
    small_native: Folders, tmp_path: Path
) -> None:
    """What the tasks add stands before its bias, which is not left out unsaid."""
    source = _read(small_native)
    name = "bert.encoder.layer.0.attention.self.query.bias"
    assert name.removesuffix(".bias") in source.model.adapters
    with pytest.raises(CheckpointError, match=f"each task has its own {name}"):
        together(source, [0, 1], tmp_path / "all", {name: source.model.weights[name]})


@pytest.mark.parametrize("name", ["t5-tiny", "t5-gated-tiny"])
def test_encoder_and_decoder(golden: Path, tmp_path: Path, name: str) -> None:
    folder = golden / "ept" / name
    meta = json.loads((folder / "meta.json").read_text())
    source = checkpoint.read(
        folder / "adapter", folder / "base", top_k=meta["moe_top_k"], tasks=meta["tasks"]
    )
    chosen = [3, 0, 7]
    sessions = together(source, chosen, tmp_path / "all")
    rng = np.random.default_rng(0)
    vocabulary = int(source.base.config["vocab_size"])
    feeds = {
        "input_ids": rng.integers(2, vocabulary, (4, 7)),
        "attention_mask": np.tri(4, 7, 3, dtype=np.int64),
    }
    places = np.array([2, 0, 1, 2])
    encoded = _run(sessions["encoder"], {**feeds, "task_ids": places})
    answers = rng.integers(2, vocabulary, (4, 5))
    decoded = _decode(sessions["decoder"], encoded, feeds, answers, {"task_ids": places})
    for place, task_id in enumerate(chosen):
        single = alone(source, task_id, tmp_path / str(task_id))
        rows = places == place
        states = _run(single["encoder"], feeds)
        _close(encoded["last_hidden_state"][rows], states["last_hidden_state"][rows])
        want = _decode(single["decoder"], states, feeds, answers, {})
        _close(decoded[rows], want[rows])
        assert np.abs(decoded[~rows] - want[~rows]).max() > 1e-3


def _run(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> dict[str, Array]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _decode(
    session: onnxruntime.InferenceSession,
    encoded: Mapping[str, Array],
    feeds: Mapping[str, Array],
    answers: Array,
    more: Mapping[str, Array],
) -> Array:
    cache = {
        name.replace("present.", "past_key_values."): value
        for name, value in encoded.items()
        if name.startswith("present.")
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values.") and value.name not in cache:
            cache[value.name] = np.zeros((4, value.shape[1], 0, value.shape[3]), np.float32)
    inputs = {
        "input_ids": answers, "encoder_attention_mask": feeds["attention_mask"], **cache, **more
    }  # fmt: skip
    return _run(session, inputs)["logits"]
