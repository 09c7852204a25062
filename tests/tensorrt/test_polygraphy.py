"""NVIDIA's own tool on graphs for TensorRT: it reads them, folds them, and runs them alike."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import eptc
from eptc.tensorrt.build_engine import PROFILES

GOLDEN = ("t5-tiny", "llama-tiny")
TOOL = Path(sys.executable).with_name("polygraphy")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None or not TOOL.is_file(),
    reason="needs polygraphy: pip install -e .[dev]",
)


@pytest.fixture(scope="module", params=["native", *GOLDEN])
def bundle(
    request: pytest.FixtureRequest, small_native: Any, tmp_path_factory: pytest.TempPathFactory
) -> eptc.Bundle:
    options: dict[str, Any] = {
        "out": tmp_path_factory.mktemp("polygraphy") / "out", "target": "tensorrt",
        "task": 0, "verify": False,
    }  # fmt: skip
    built: eptc.Bundle
    if request.param == "native":
        built = eptc.export(small_native.ckpt, base=small_native.base, **options)
        return built
    folder = request.getfixturevalue("golden") / "ept" / request.param
    meta = json.loads((folder / "meta.json").read_text())
    built = eptc.export(
        folder / "adapter", base=folder / "base", tasks=meta["tasks"], top_k=meta["moe_top_k"],
        **options,
    )  # fmt: skip
    return built


def polygraphy(*arguments: object) -> str:
    ran = subprocess.run(
        [str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def graphs(bundle: eptc.Bundle) -> Any:
    found = json.loads((bundle.path / PROFILES).read_text())["graphs"]
    assert set(found) == set(bundle.manifest.graphs)
    return found.items()


def feeds(bundle: eptc.Bundle, role: str, shapes: Any, bound: str) -> dict[str, Any]:
    """Return random tokens and caches of a profile's shapes."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for spec in bundle.manifest.graphs[role].inputs:
        shape = shapes[spec.name][bound]
        if spec.dtype == "float32":
            found[spec.name] = rng.normal(size=shape).astype(np.float32)
        elif "mask" in spec.name:
            found[spec.name] = np.ones(shape, np.int64)
        else:
            most = {"input_ids": 13, "position_ids": 4}.get(spec.name, 2)
            found[spec.name] = rng.integers(0, most, shape)
    return found


def test_inspect(bundle: eptc.Bundle) -> None:
    """Every input and output, with its type and the names of its sizes."""
    for role, graph in graphs(bundle):
        said = polygraphy("inspect", "model", bundle.path / graph["file"])
        spec = bundle.manifest.graphs[role]
        assert f"{len(spec.inputs)} Graph Input(s)" in said
        assert f"{len(spec.outputs)} Graph Output(s)" in said
        for tensor in (*spec.inputs, *spec.outputs):
            assert f"{tensor.name} [dtype={tensor.dtype}, shape=" in said


def test_sanitize(bundle: eptc.Bundle, tmp_path: Path) -> None:
    """Folding constants leaves a sound graph that gives the same numbers."""
    pytest.importorskip("onnx_graphsurgeon")
    for role, graph in graphs(bundle):
        folded = tmp_path / graph["file"]
        source = bundle.path / graph["file"]
        polygraphy("surgeon", "sanitize", source, "--fold-constants", "-o", folded)
        model = onnx.load(folded)
        # What it guesses of shapes in between is not always right, and no part of the graph.
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
        fed = feeds(bundle, role, graph["inputs"], "min")
        sessions = (
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            for path in (source, folded)
        )
        ours, theirs = (session.run(None, fed) for session in sessions)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bound", ["min", "opt"])
def test_run(bundle: eptc.Bundle, bound: str, tmp_path: Path) -> None:
    """Run in ONNX Runtime on the profile's shapes, it gives what the engine answers."""
    from polygraphy.json import load_json, save_json

    with bundle.load(providers=["cpu"]) as engine:
        for role, graph in graphs(bundle):
            fed = feeds(bundle, role, graph["inputs"], bound)
            inputs, outputs = tmp_path / f"{role}-in.json", tmp_path / f"{role}-out.json"
            save_json([fed], str(inputs))
            polygraphy(
                "run", bundle.path / graph["file"], "--onnxrt", "--load-inputs", inputs,
                "--save-outputs", outputs,
            )  # fmt: skip
            ((_, (theirs,)),) = load_json(str(outputs)).items()
            ours = engine.run(fed, role)
            assert set(ours) == set(theirs)
            for name, value in ours.items():
                np.testing.assert_allclose(value, theirs[name], rtol=0, atol=2e-5)
