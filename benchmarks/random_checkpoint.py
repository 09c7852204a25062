"""A random EPT checkpoint for a base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_weights import generator, meta_model

__all__ = ["write_checkpoint"]

KERNEL_SIZES = (2, 2, 4, 4, 6, 6, 8, 8)
TOP_K = 2
RANK = 8
TASKS = 8


def write_checkpoint(base: Path, folder: Path, targets: tuple[str, ...], *, seed: int = 0) -> None:
    """Write a native checkpoint of the released variant with random tensors.

    Args:
        base: folder of the base model; only its configuration is read.
        folder: made where it is missing.
        targets: the linears to adapt, by the ends of their names.
        seed: of the tensors.
    """
    import torch
    from transformers import AutoConfig

    from eptc.nn import EptConfig, native
    from eptc.tasks import Task

    config = AutoConfig.from_pretrained(base)
    labels = ("no", "yes") if config.model_type == "bert" else ()
    kind: Any = "classification" if labels else "generation"
    tasks = tuple(Task(f"task-{i}", kind, labels=labels) for i in range(TASKS))
    options = EptConfig(
        variant="released", targets=targets, kernel_sizes=KERNEL_SIZES, top_k=TOP_K, rank=RANK,
        tasks=tasks,
    )  # fmt: skip
    options = dataclasses.replace(
        options, base=dataclasses.replace(options.base, model_type=config.model_type)
    )
    tensors = {
        name: torch.from_numpy(generator(name, seed).standard_normal(shape, np.float32) * scale)
        for name, shape, scale in _tensors(config, targets, len(labels))
    }
    folder.mkdir(parents=True, exist_ok=True)
    native.write(folder, options, tensors)


def _tensors(
    config: Any, targets: tuple[str, ...], labels: int
) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Yield name, shape and standard deviation of each tensor."""
    model = meta_model(config)
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] not in targets or getattr(module, "weight", None) is None:
            continue
        height, width = module.weight.shape
        # So that a task moves a weight by about a tenth of itself.
        yield f"{path}.ept.A", (RANK, width // 2), 0.05
        yield f"{path}.ept.B", (height // 2, RANK), 0.05
        for expert, size in enumerate(KERNEL_SIZES):
            yield f"{path}.ept.kernels.{expert}", (max(1, height // size), size), 0.3
        yield f"{path}.ept.router.weight", (len(KERNEL_SIZES), width), 0.05
        yield f"{path}.ept.router.bias", (len(KERNEL_SIZES),), 0.05
        yield f"{path}.ept.task_embedding", (TASKS, width), 0.05
    for task in range(TASKS if labels else 0):
        yield f"heads.task-{task}.classifier.weight", (labels, config.hidden_size), 0.05
        yield f"heads.task-{task}.classifier.bias", (labels,), 0.05
