"""Packs of the small native checkpoint, and adapters of other formats over its base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import eptc
from tests.conftest import Folders

TEXTS: dict[str, list[Any]] = {
    "tone": ["good film", "the film was not good", "a long and dull film"],
    "same": [("a good film", "a bad film"), ("quiet", "the very long film")],
    "score": ["good film", "a short and very quiet film"],
    "mood": ["good film", "the film was dull"],
}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A pack of the tasks tone and score, which a test may change, and its checkpoint."""

    path: Path
    folders: Folders

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every file."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.path.iterdir())
        }

    def manifest(self) -> Any:
        """Return pack.json as JSON values."""
        return json.loads((self.path / "pack.json").read_text())

    def add(self, ckpt: Path | None = None, **options: Any) -> Any:
        """Add a task of the checkpoint, or of another one."""
        options.setdefault("base", self.folders.base)
        return eptc.add_task(self.path, ckpt or self.folders.ckpt, **options)


@pytest.fixture(scope="session")
def built_pack(small_native: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of the tasks tone and score, for reading."""
    out = tmp_path_factory.mktemp("packs") / "pack"
    eptc.export(
        small_native.ckpt, base=small_native.base, task="tone,score", layout="pack", out=out
    )
    return out


@pytest.fixture
def packed(built_pack: Path, small_native: Folders, tmp_path: Path) -> Packed:
    """A copy of it, for a test to change."""
    shutil.copytree(built_pack, tmp_path / "pack")
    return Packed(tmp_path / "pack", small_native)


@pytest.fixture(scope="session")
def alone(
    small_native: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that returns the bundle of one task of the small native checkpoint."""
    root, made = tmp_path_factory.mktemp("alone"), dict[str, Path]()

    def build(task: str) -> Path:
        if task not in made:
            made[task] = root / task
            eptc.export(
                small_native.ckpt, base=small_native.base, task=task, out=made[task], verify=False
            )
        return made[task]

    return build


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def write_lora(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a PEFT LoRA adapter over the small native base.

    It has a head of three labels, unless others are given.
    """

    def write(*linears: str, labels: int = 3, width: int = 34, **config: Any) -> Path:
        rng = np.random.default_rng(5)
        folder = tmp_path / "lora"
        folder.mkdir()
        tensors = {
            "classifier.weight": rng.standard_normal((labels, width)),
            "classifier.bias": rng.standard_normal(labels),
        }
        for path in linears or (QUERY,):
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((4, width))
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((width, 4))
        save_file(
            {f"base_model.model.{n}": t.astype(np.float32) for n, t in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        settings = {
            "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8,
            "target_modules": sorted({path.rpartition(".")[2] for path in linears or (QUERY,)}),
            "base_model_name_or_path": "small-bert", **config,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / "tasks.json").write_text(json.dumps([{
            "name": "mood", "kind": "classification",
            "labels": ["low", "flat", "high"][:labels],
        }]))  # fmt: skip
        return folder

    return write
