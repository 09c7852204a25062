"""`eptc convert`: a folder of the released code as a native checkpoint, complete from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eptc import bundle, checkpoint
from eptc.checkpoint import Contents
from eptc.errors import OptionError
from eptc.ir import Adapter, Branch, CellScaledLowRank, PerTask, TaskRouter
from eptc.tensors import LazyTensor

__all__ = ["convert"]


def convert(
    ckpt: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    allow_pickle: bool = False,
    format: str | None = None,
    force: bool = False,
) -> Path:
    """Write a native checkpoint with everything the released folder lacks.

    Args:
        ckpt: folder of the released EPT code.
        out: folder to write: new, empty, or replaced with `force`.
        base: folder of the base model; its hash is recorded.
        tasks: task names in id order.
        top_k: experts a task uses.
        task_spec: JSON file with prompts and labels of tasks that are not the published ones.
        allow_pickle: read `adapter_model.bin` (weights only).
        format: of the checkpoint; None: what its folder looks like.
        force: replace what lies at `out`.

    Returns:
        The folder.

    Raises:
        InputError: something about the input; nothing was written.
    """
    import torch

    from eptc.nn import EptConfig, native

    inputs = {"the checkpoint": ckpt, "the base model": base, "the task description": task_spec}
    bundle.check_place(Path(out), force=force, inputs=inputs)
    source = checkpoint.read(
        Path(ckpt),
        Path(base) if base is not None else None,
        top_k=top_k,
        tasks=tasks,
        task_spec=Path(task_spec) if task_spec is not None else None,
        allow_pickle=allow_pickle,
        format=format,
    )
    if source.contents.format != "released":
        raise OptionError(
            f"{ckpt} is a {source.contents.format} checkpoint",
            expected="a folder of the released EPT code, which lacks what the native format adds",
            fix="use it as it is",
        )
    with bundle.draft(Path(out), force=force) as draft:
        tensors = {
            name: torch.from_numpy(np.array(tensor.numpy(), np.float32)).reshape(shape)
            for name, (tensor, shape) in _tensors(source.contents.adapters).items()
        }
        native.write(draft.path, EptConfig.from_json(_config(source)), tensors)
        draft.publish()
    return draft.out


def _config(source: checkpoint.Checkpoint) -> dict[str, Any]:
    contents = source.contents
    options = contents.config
    rule = "alpha/sqrt(r)" if options.get("use_rslora") else "alpha/r"
    rank, alpha = int(options["r"]), float(options["lora_alpha"])
    return {
        "schema_version": 1,
        "variant": "released",
        "base": {
            "model_type": source.base.config["model_type"],
            "name": str(options.get("base_model_name_or_path") or ""),
            "sha256": source.base.sha256,
        },
        "kernel_sizes": list(contents.kernel_sizes),
        "top_k": contents.top_k,
        "rank": rank,
        "gate": {"router_input": "task", "temperature": 1.0, "normalization": "softmax"},
        "scale": {"rule": rule, "alpha": alpha},
        "sharing": "per-linear",
        "modules": _overrides(contents.adapters, rank, alpha, rule),
        "targets": _targets(contents, source.base.linears),
        "tasks": [task.to_json() for task in contents.tasks],
    }


def _overrides(
    adapters: Mapping[str, Adapter], rank: int, alpha: float, rule: str
) -> dict[str, Any]:
    """Return rank and alpha of the linears that differ from the rest."""
    modules = {}
    for path, adapter in adapters.items():
        delta, branch = _delta(adapter.branches[0]), adapter.branches[0]
        own_rank = delta.A.shape[0]
        own_alpha = branch.scale * (own_rank if rule == "alpha/r" else own_rank**0.5)
        if own_rank != rank or not np.isclose(own_alpha, alpha, rtol=1e-12):
            modules[path] = {"rank": own_rank, "alpha": float(f"{own_alpha:.12g}")}
    return modules


def _targets(contents: Contents, linears: Mapping[str, Any]) -> list[str]:
    """Return the short target names where they name just the adapted linears, else all paths."""
    names = contents.config.get("target_modules")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        named = {p for p in linears for t in names if p == t or p.endswith(f".{t}")}
        if named == set(contents.adapters):
            return sorted(names)
    return sorted(contents.adapters)


def _tensors(adapters: Mapping[str, Adapter]) -> dict[str, tuple[LazyTensor, tuple[int, ...]]]:
    """Return each tensor under its native name, with the shape it has there."""
    tensors: dict[str, LazyTensor] = {}
    for path, adapter in adapters.items():
        router = adapter.router
        assert isinstance(router, TaskRouter)
        assert router.bias is not None
        first = _delta(adapter.branches[0])
        tensors |= {
            f"{path}.ept.A": first.A,
            f"{path}.ept.B": first.B,
            f"{path}.ept.router.weight": router.weight,
            f"{path}.ept.router.bias": router.bias,
            f"{path}.ept.task_embedding": router.embedding,
        }
        for branch in adapter.branches:
            assert isinstance(branch.gate, PerTask)
            tensors[f"{path}.ept.kernels.{branch.gate.expert}"] = _delta(branch).kernel
    return {
        name: (t, t.shape[1:3] if len(t.shape) == 4 else t.shape) for name, t in tensors.items()
    }


def _delta(branch: Branch) -> CellScaledLowRank:
    assert isinstance(branch.delta, CellScaledLowRank)
    return branch.delta
