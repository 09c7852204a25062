"""The gates that are observed are those the engine computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from eptc import lower
from eptc.calibration import observe_gates
from eptc.job import Job
from eptc.nn import load_reference
from eptc.options import Options
from eptc.pipeline import adapter_passes
from eptc.run_passes import run_adapter_passes, run_graph_passes
from eptc.runtime import Engine

TEXTS = ("a good film", "the very long and dull film was not good", "bad")


@pytest.fixture(scope="module")
def built(
    small_routed: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, onnx_ir.Model]]:
    """A routed engine, and its graphs, which know where the gates are."""
    import eptc

    out = tmp_path_factory.mktemp("routed") / "bundle"
    eptc.export(small_routed.ckpt, base=small_routed.base, task="same", out=out, verify=False)
    job = Job.read(small_routed.ckpt, Options("same", small_routed.base))
    model, _ = run_adapter_passes(
        job.source.model, adapter_passes(job.task_id), task_id=job.task_id, probe=None
    )
    graphs = job.bound(model)
    run_graph_passes(graphs, job.graph_passes())
    return out, graphs


def test_mean_and_spread(small_routed: Any, built: tuple[Path, dict[str, onnx_ir.Model]]) -> None:
    """Over all tokens of all texts, as the reference's routers give them; padding has no share."""
    bundle, graphs = built
    examples = [{"first": text, "second": "film"} for text in TEXTS]
    gates = {name: lower.routed_by(graph.graph) for name, graph in graphs.items()}
    found = observe_gates(bundle, examples, gates)

    reference = load_reference(small_routed.ckpt, small_routed.base)
    assert set(found) == set(reference.layers)
    seen: dict[str, list[Any]] = {path: [] for path in found}

    def keep(path: str) -> Any:
        def hook(layer: Any, args: Any) -> None:
            seen[path].append(layer.gates(args[0]).reshape(-1, 4).numpy())

        return hook

    for path, layer in reference.layers.items():
        layer.register_forward_pre_hook(keep(path))
    import torch

    with Engine.load(bundle, providers=["cpu"]) as engine, torch.no_grad():
        for example in examples:
            feeds = {n: torch.from_numpy(a) for n, a in engine.tokenize([example]).items()}
            with reference.task("same"):
                reference.hf(**feeds)
    for path, statistics in found.items():
        rows = np.concatenate(seen[path]).astype(np.float64)
        assert statistics.count == len(rows)
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(statistics.spread, rows.std(0), rtol=0, atol=1e-4)
        assert sum(statistics.mean) == pytest.approx(1, abs=1e-5)
        assert max(statistics.spread) > 0.01
