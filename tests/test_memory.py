"""Memory is bounded by the largest tensors: a build succeeds where its weights would not fit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import eptc
from eptc import checkpoint
from eptc.interop import hf

MB = 10**6
# What the build is told it may have resident: the largest linear has 17 MB in float32.
LIMIT = 850 * MB
WIDTH, LAYERS = 2048, 6
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_folding_streams(tmp_path: Path) -> None:
    """The weights are more than the process may still ask for.

    Once everything is imported and warm, its address space may grow by no more than what is
    left of `max_memory`: it cannot have more resident.
    """
    report = _in_a_child(tmp_path, "onnx")
    assert report["weight_bytes"] >= 1.2 * report["room"]
    assert report["written"] >= report["weight_bytes"]
    assert report["room_used"] <= report["room"]
    assert report["peak"] <= LIMIT
    assert report["control"] == "MemoryError"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="needs /proc")
def test_a_folder_streams(tmp_path: Path) -> None:
    """Folded, written and compared with a file's worth of weights in memory, not the model's."""
    report = _in_a_child(tmp_path, "hf")
    assert report["mode"] == "weights"
    assert report["weight_bytes"] > 600 * MB
    assert report["grown"] <= 150 * MB


def _in_a_child(root: Path, target: str) -> dict[str, Any]:
    """Return what a process of its own reports; the folder is removed."""
    try:
        child = subprocess.run(
            [sys.executable, __file__, str(root), target],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "2",
                # What is freed goes back: else glibc keeps 0 to 200 MB of it, by chance.
                "MALLOC_MMAP_THRESHOLD_": str(MB),
                "EPTC_CACHE_DIR": "",
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        shutil.rmtree(root)
    assert child.returncode == 0, child.stderr
    report: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return report


def write_model(root: Path, width: int, layers: int) -> int:
    """Write a Llama in float16 shards and a checkpoint that adapts all its linears.

    Returns:
        Bytes of the weights in float32.
    """
    block = np.random.default_rng(0).standard_normal(100_003).astype(np.float16) / 16
    base, ckpt = root / "base", root / "ckpt"
    base.mkdir(parents=True)
    ckpt.mkdir()
    index: dict[str, str] = {}
    total = 0
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.{linear}.weight": (width, width) for linear in LINEARS
        }
        shapes |= {
            f"{prefix}.{norm}.weight": (width,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        if layer == 0:
            shapes |= {"model.embed_tokens.weight": (64, width), "model.norm.weight": (width,)}
        tensors = {name: np.resize(block, shape) for name, shape in shapes.items()}
        safetensors.numpy.save_file(tensors, base / f"model-{layer}.safetensors")
        index |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
        total += sum(4 * tensor.size for tensor in tensors.values())
    shards = {"metadata": {}, "weight_map": index}
    (base / "model.safetensors.index.json").write_text(json.dumps(shards))
    (base / "config.json").write_text(json.dumps(_base_config(width, layers)))
    sizes = (2, 4, 8)
    adapters: dict[str, Any] = {}
    for path in (f"model.layers.{n}.{linear}" for n in range(layers) for linear in LINEARS):
        parts: dict[str, tuple[int, ...]] = {
            "A": (4, width // 2),
            "B": (width // 2, 4),
            "router.weight": (len(sizes), width),
            "task_embedding": (1, width),
            **{f"kernels.{e}": (s, s) for e, s in enumerate(sizes)},
        }
        adapters |= {
            f"{path}.ept.{part}": np.resize(block, shape) for part, shape in parts.items()
        }
    safetensors.numpy.save_file(adapters, ckpt / "ept_model.safetensors")
    (ckpt / "ept_config.json").write_text(json.dumps(_ept_config(sizes)))
    return total


def _base_config(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _ept_config(sizes: tuple[int, ...]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "variant": "paper",
        "base": {"model_type": "llama"},
        "kernel_sizes": list(sizes),
        "top_k": 2,
        "rank": 4,
        "gate": {"router_input": "task", "temperature": 0.05, "normalization": "sum"},
        "scale": {"rule": "alpha/r", "alpha": 8},
        "sharing": "per-linear",
        "targets": [linear.rpartition(".")[2] for linear in LINEARS],
        "tasks": [{"name": "only", "kind": "generation"}],
    }


def _status(key: str) -> int:
    """Return a size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _export(root: Path) -> eptc.Bundle:
    return eptc.export(
        root / "ckpt", base=root / "base", task="only", out=root / "out", verify=False,
        max_memory=LIMIT,
    )  # fmt: skip


def build_within_limits(root: Path) -> dict[str, Any]:
    """Build a large model with little room left; must run in a process of its own."""
    write_model(root / "tiny", 64, 1)
    weight_bytes = write_model(root / "large", WIDTH, LAYERS)
    _export(root / "tiny")  # imports everything and warms up
    before = _status("VmSize")
    room = LIMIT - _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (before + room, resource.RLIM_INFINITY))
    built = _export(root / "large")
    used, peak = _status("VmPeak") - before, _status("VmHWM")
    source = checkpoint.read(root / "large" / "ckpt", root / "large" / "base")
    try:
        # The control: whoever reads all weights before writing them fails here.
        held = [tensor.numpy().astype(np.float32) for tensor in source.model.weights.values()]
        control = f"{len(held)} tensors"
    except MemoryError as error:
        control = type(error).__name__
    return {
        "weight_bytes": weight_bytes,
        "written": built.manifest.files["weights.bin"].size,
        "room": room,
        "room_used": used,
        "peak": peak,
        "control": control,
    }


def fold_into_files(root: Path) -> dict[str, Any]:
    """Write a large model as files of 32 MB; must run in a process of its own."""
    vars(hf).update(SHARD=32 * MB, fits=lambda _: False)
    write_model(root / "tiny", 64, 1)
    weight_bytes = write_model(root / "large", WIDTH, LAYERS)

    def export(name: str) -> eptc.Folder:
        return eptc.export(
            root / name / "ckpt", base=root / name / "base", target="hf", out=root / name / "out"
        )

    export("tiny")  # imports everything and warms up
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    folder = export("large")
    return {
        "weight_bytes": weight_bytes,
        "grown": _status("VmHWM") - before,
        "mode": folder.parity["only"]["mode"],
    }


if __name__ == "__main__":
    work = {"onnx": build_within_limits, "hf": fold_into_files}[sys.argv[2]]
    sys.stdout.write(json.dumps(work(Path(sys.argv[1]))) + "\n")
