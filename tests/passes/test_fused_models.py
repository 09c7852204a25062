"""Each list of graph passes on whole models: the same numbers as with standard operators."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import pytest

from eptc.pipeline import graph_passes
from eptc.precision import OptimizeFor
from eptc.run_passes import run_graph_passes

Arrays = dict[str, npt.NDArray[Any]]

# Rows of a mask [2, 5]: holes, one key alone; then left padding.
HOLES = np.array([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
LEFT = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])

# What each provider's kernels make of one layer.
FUSED: dict[tuple[str, OptimizeFor], dict[str, int]] = {
    ("bert", "cpu"): {"MultiHeadAttention": 0},
    ("bert", "cuda"): {"MultiHeadAttention": 2},
    ("roberta", "cuda"): {"MultiHeadAttention": 2},
    ("t5", "cpu"): {"MultiHeadAttention": 4},
    ("t5", "cuda"): {"MultiHeadAttention": 6},
    ("gated-t5", "cuda"): {"MultiHeadAttention": 6},
    ("llama", "cpu"): {"RotaryEmbedding": 4, "MultiHeadAttention": 2},
    ("llama", "cuda"): {"RotaryEmbedding": 4, "MultiHeadAttention": 2},
    ("grouped-llama", "cpu"): {"RotaryEmbedding": 4, "MultiHeadAttention": 0},
    ("grouped-llama", "cuda"): {"RotaryEmbedding": 4, "MultiHeadAttention": 0},
}


class Engine:
    """Plain sessions on the graphs that a list of passes makes."""

    def __init__(self, graphs: dict[str, onnx_ir.Model], sessions: dict[str, Any]) -> None:
        self.sessions = sessions
        self.operators = collections.Counter(
            node.op_type for model in graphs.values() for node in model.graph
        )

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        session = self.sessions[graph]
        for spec in session.get_inputs():
            if spec.name.startswith("past_") and spec.name not in feeds:
                shape = (len(feeds["input_ids"]), spec.shape[1], 0, spec.shape[3])
                feeds = {**feeds, spec.name: np.zeros(shape, np.float32)}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


def past(outputs: Arrays) -> Arrays:
    return {n.replace("present.", "past_key_values."): v for n, v in outputs.items() if "." in n}


def outputs(engine: Engine, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Arrays:
    """Run everything a model has, decoders in two steps; rows nobody reads are left out."""
    masked = {"input_ids": ids, "attention_mask": mask}
    if "encoder" in engine.sessions:
        encoded = engine.run("encoder", masked)
        found = dict(encoded)
        cache = past(encoded)
        for step, written in enumerate((ids[:, :3], ids[:, 3:4], ids[:, 1:])):
            feeds = {"input_ids": written, "encoder_attention_mask": mask, **cache}
            made = engine.run("decoder", feeds)
            cache |= past(made)
            found |= {f"{step}.{name}": value for name, value in made.items()}
        return found
    if "position_ids" not in [spec.name for spec in engine.sessions["model"].get_inputs()]:
        if len(engine.sessions["model"].get_inputs()) > 2:
            masked["token_type_ids"] = ids % 2
        return engine.run("model", masked)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    found, cache = {}, {}
    for start, end in ((0, 3), (3, 4), (4, 5)):
        part = slice(start, end)
        feeds = {
            "input_ids": ids[:, part],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, part],
            **cache,
        }
        made = engine.run("model", feeds)
        cache = past(made)
        found[f"{start}.logits"] = made["logits"][mask[:, part].astype(bool)]
    return found


@pytest.mark.parametrize(("name", "provider"), FUSED)
def test_equals_standard_operators(
    name: str, provider: OptimizeFor, whole_model: Any, sessions: Any, tmp_path: Path
) -> None:
    """Holes in masks, left padding, no past and some, one token and several, batch 1 and 2."""
    engines = []
    for kind in ("any", provider):
        graphs = whole_model(name)
        run_graph_passes(graphs, graph_passes(kind))
        engines.append(Engine(graphs, sessions(graphs, tmp_path / kind)))
    plain, fused = engines
    assert not any("Attention" in op for op in plain.operators)
    counted = {op: fused.operators[op] for op in FUSED[name, provider]}
    assert counted == FUSED[name, provider]
    ids = np.random.default_rng(1).integers(3, 40, size=(2, 5))
    for mask in (HOLES, LEFT):
        for rows in (slice(0, 2), slice(1, 2)):
            want = outputs(plain, ids[rows], mask[rows])
            got = outputs(fused, ids[rows], mask[rows])
            assert got.keys() == want.keys()
            for key, array in want.items():
                bound = 1e-5 * float(np.abs(array).max(initial=0))
                np.testing.assert_allclose(got[key], array, rtol=0, atol=bound, err_msg=key)
