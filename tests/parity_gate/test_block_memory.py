"""Block by block a model takes a part of its weights' memory; as a whole, a multiple of it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc import checkpoint
from eptc.parity_gate import load_reference, prove
from eptc.parity_gate.blocks import prove_blocks
from eptc.parity_gate.memory import verified_by_block, whole_model_bytes
from eptc.runtime import Engine
from eptc.runtime.manifest import load_manifest

WIDTH, LAYERS = 1536, 8
CLEAR = Path("/proc/self/clear_refs")


@pytest.mark.skipif(not CLEAR.is_file(), reason="needs /proc")
def test_blocks_take_a_part_of_the_weights(tmp_path: Path) -> None:
    # A process for each: what one has freed, the next would use again.
    try:
        report = {what: _child(what, tmp_path) for what in ("build", "blocks", "whole")}
    finally:
        shutil.rmtree(tmp_path)
    weights = report["build"]["weights"]
    # A block is an eighth of the weights: in PyTorch, or mapped and packed by ONNX Runtime.
    assert report["blocks"]["peak"] <= 0.55 * weights
    assert report["whole"]["peak"] >= 1.1 * weights
    predicted = report["build"]["predicted"]
    assert 0.5 * predicted <= report["whole"]["peak"] <= predicted


def test_limit_decides(small_native: Any) -> None:
    source = checkpoint.read(small_native.ckpt, small_native.base)
    needed = whole_model_bytes(source)
    stored = sum(path.stat().st_size for path in small_native.root.rglob("*.safetensors"))
    assert 2 * stored <= needed + 2 * 40_000  # the files' headers are no numbers
    assert not verified_by_block(source, "fp32", None)
    assert not verified_by_block(source, "fp32", needed)
    assert verified_by_block(source, "fp32", needed - 1)
    assert verified_by_block(source, "fp16-weights", None)


def _child(what: str, root: Path) -> Any:
    child = subprocess.run(
        [sys.executable, __file__, what, str(root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def _build(root: Path) -> dict[str, int]:
    path = Path(__file__).parents[1] / "test_memory.py"
    spec = importlib.util.spec_from_file_location("test_memory", path)
    assert spec is not None
    assert spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    models.write_model(root / "tiny", 64, 1)
    weights = models.write_model(root / "large", WIDTH, LAYERS)
    for folder in (root / "tiny", root / "large"):
        ckpt, base, out = folder / "ckpt", folder / "base", folder / "out"
        eptc.export(ckpt, base=base, task="only", out=out, verify=False)
    source = checkpoint.read(root / "large" / "ckpt", root / "large" / "base")
    return {"weights": weights, "predicted": whole_model_bytes(source)}


def _blocks(source: checkpoint.Checkpoint, out: Path) -> bool:
    manifest = load_manifest(out)
    return prove_blocks(out, manifest, source, "only", None).passed


def _whole(source: checkpoint.Checkpoint, out: Path) -> bool:
    reference = load_reference(source)
    with Engine.load(out, providers=["cpu"], threads=1) as engine:
        return prove(out, engine, reference, 0, None).passed


def _measure(verify: Callable[[checkpoint.Checkpoint, Path], bool], root: Path) -> dict[str, int]:
    """Return by how many bytes a verification raises the resident memory at its peak."""
    for folder in (root / "tiny", root / "large"):
        before = _status("VmRSS")
        CLEAR.write_text("5")  # the peak starts again at what is resident now
        assert verify(checkpoint.read(folder / "ckpt", folder / "base"), folder / "out")
    return {"peak": _status("VmHWM") - before}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "build":
        result = _build(folder)
    else:
        result = _measure(_blocks if what == "blocks" else _whole, folder)
    sys.stdout.write(json.dumps(result) + "\n")
