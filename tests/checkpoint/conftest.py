"""Checkpoints of any size, written tensor by tensor, and what they must mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

Float32 = npt.NDArray[np.float32]
PUBLISHED = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
_PARTS = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "router.weight": "lora_gate.0.weight",
    "router.bias": "lora_gate.0.bias",
    "task_embedding": "lora_task_embedding.weight",
}


@dataclasses.dataclass(frozen=True)
class Written:
    """A base and a checkpoint on disk, and the tensors they were made of.

    Args:
        base: folder of the base: a Llama of nothing but the adapted linears.
        ckpt: folder of the checkpoint.
        shapes: [out, in] by module path.
        tensors: the adapters' tensors by `<module path>.<part>`.
        config: the checkpoint's configuration.
    """

    base: Path
    ckpt: Path
    shapes: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, Float32]
    config: Mapping[str, Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def write_base(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a base of given tensors."""

    def write(tensors: Mapping[str, np.ndarray[Any, Any]], **config: Any) -> Path:
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        text = json.dumps({"model_type": "llama", "vocab_size": 10, **config})
        (folder / "config.json").write_text(text)
        safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def write_released(tmp_path: Path, write_base: Callable[..., Path]) -> Callable[..., Written]:
    """Return a function that writes a folder of the released code with random numbers."""

    def write(
        shapes: Mapping[str, tuple[int, int]],
        sizes: tuple[int, ...],
        *,
        rank: int = 4,
        ranks: Mapping[str, int] | None = None,
        rows: int = 8,
        **options: Any,
    ) -> Written:
        rng = np.random.default_rng(5)

        def draw(*shape: int) -> Float32:
            return rng.standard_normal(shape).astype(np.float32)

        tensors: dict[str, Float32] = {}
        for path, (out, columns) in shapes.items():
            r = (ranks or {}).get(path, rank)
            tensors |= {
                f"{path}.A": draw(r, columns // 2),
                f"{path}.B": draw(out // 2, r),
                f"{path}.router.weight": draw(len(sizes), columns),
                f"{path}.router.bias": draw(len(sizes)),
                f"{path}.task_embedding": draw(rows, columns),
            }
            for e, s in enumerate(sizes):
                tensors[f"{path}.kernels.{e}"] = draw(max(1, out // s), s)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 16,
            "target_modules": sorted({path.rpartition(".")[2] for path in shapes}),
            "bias": "none",
            "use_dora": False,
            "use_rslora": False,
            "base_model_name_or_path": "./bases/made",
            **options,
        }
        folder = tmp_path / "ckpt"
        folder.mkdir()
        safetensors.numpy.save_file(
            {released_name(name): _released_shape(name, t) for name, t in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "adapter_config.json").write_text(json.dumps(config))
        base = write_base({f"{path}.weight": draw(*shape) for path, shape in shapes.items()})
        return Written(base, folder, shapes, tensors, config)

    return write


@pytest.fixture
def write_paper(tmp_path: Path, write_base: Callable[..., Path]) -> Callable[..., Written]:
    """Return a function that writes a native checkpoint of the paper's variant.

    Every A and B is `spare` larger than the largest crop, as the format allows.
    """

    def write(
        shapes: Mapping[str, tuple[int, int]],
        sizes: tuple[int, ...],
        *,
        rank: int = 3,
        ranks: Mapping[str, int] | None = None,
        rows: int = 3,
        spare: int = 0,
        dtype: str = "float32",
        **options: Any,
    ) -> Written:
        rng = np.random.default_rng(6)

        def draw(*shape: int) -> Float32:
            return rng.standard_normal(shape).astype(dtype).astype(np.float32)

        shared = options.get("sharing") == "model"
        pairs = {path: (shape, (ranks or {}).get(path, rank)) for path, shape in shapes.items()}
        if shared:
            tallest, widest = (max(s[axis] for s in shapes.values()) for axis in (0, 1))
            pairs = {"shared": ((tallest, widest), rank)}
        tensors: dict[str, Float32] = {}
        for path, ((out, columns), r) in pairs.items():
            height, width = -(-out // min(sizes)), -(-columns // min(sizes))
            tensors |= {
                f"{path}.A": draw(r, width + spare),
                f"{path}.B": draw(height + spare, r),
            }
        for path, (_, columns) in shapes.items():
            tensors |= {
                f"{path}.router.weight": draw(len(sizes), columns) / np.float32(8),
                f"{path}.task_embedding": draw(rows, columns) / np.float32(8),
            }
            for e, s in enumerate(sizes):
                tensors[f"{path}.kernels.{e}"] = draw(s, s)
        config = {
            "schema_version": 1,
            "variant": "paper",
            "base": {"model_type": "llama", "name": "made", "sha256": None},
            "kernel_sizes": list(sizes),
            "top_k": 2,
            "rank": rank,
            "gate": {"router_input": "task", "temperature": 0.05, "normalization": "sum"},
            "scale": {"rule": "alpha/r", "alpha": 8},
            "sharing": "per-linear",
            "modules": {path: {"rank": r} for path, r in (ranks or {}).items()},
            "targets": sorted(shapes),
            "tasks": [{"name": f"task{i}", "kind": "generation"} for i in range(3)],
            **options,
        }
        folder = tmp_path / "ckpt"
        folder.mkdir()
        stored = {native_name(name): tensor.astype(dtype) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(stored, folder / "ept_model.safetensors")
        (folder / "ept_config.json").write_text(json.dumps(config))
        base = write_base({f"{path}.weight": draw(*shape) for path, shape in shapes.items()})
        return Written(base, folder, shapes, tensors, config)

    return write


def native_name(name: str) -> str:
    """Put the format's marker between module path and part."""
    for part in (*_PARTS, "kernels"):
        before, found, after = name.rpartition(f".{part}")
        if found and (not after or part == "kernels"):
            return f"{before}.ept.{part}{after}"
    raise AssertionError(name)


def released_name(name: str) -> str:
    """Spell a tensor's name as the released code does."""
    path, _, part = native_name(name).partition(".ept.")
    own = _PARTS.get(part) or part.replace("kernels.", "lora_expert_kernels.")
    return f"base_model.model.{path}.{own}"


def _released_shape(name: str, tensor: Float32) -> Float32:
    return tensor[None, :, :, None] if ".kernels." in name else tensor
