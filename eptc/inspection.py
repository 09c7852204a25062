"""`eptc inspect`: what a checkpoint, a bundle or a pack holds, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eptc.runtime.spec import MANIFEST, PACK

if TYPE_CHECKING:  # a bundle is inspected without the compiler's packages
    from eptc.ir import Adapter

__all__ = ["inspect", "route"]


def inspect(
    path: str | Path,
    *,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    allow_pickle: bool = False,
    format: str | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint, a bundle or a pack holds.

    For a checkpoint: tasks, experts, and the route of every task in every linear with its
    margin; size of the adapters and of the engine to expect. For a bundle or a
    pack: its manifest.

    Args:
        path: the folder.
        base: folder of the base model (checkpoints).
        tasks: task names in id order, where the checkpoint does not store them.
        top_k: experts a task uses, where the checkpoint does not store it.
        task_spec: JSON file with prompts and labels.
        allow_pickle: read `.bin` files (weights only).
        format: of the checkpoint; None: what its folder looks like.

    Raises:
        InputError: the folder cannot be read.
    """
    path = Path(path)
    if (path / PACK).exists():
        from eptc.runtime.pack_manifest import read_pack

        return {"what": "pack", "path": str(path), **read_pack(path).to_json()}
    if (path / MANIFEST).exists():
        from eptc.runtime import load_manifest

        return {"what": "bundle", "path": str(path), **load_manifest(path).to_json()}

    from eptc import checkpoint

    source = checkpoint.read(
        path,
        Path(base) if base is not None else None,
        top_k=top_k,
        tasks=tasks,
        task_spec=Path(task_spec) if task_spec is not None else None,
        allow_pickle=allow_pickle,
        format=format,
    )
    contents = source.contents
    heads = [sum(t.nbytes for t in head.values()) for head in contents.heads.values()]
    return {
        "what": "checkpoint",
        "path": str(path),
        "format": contents.format,
        **({"origin": str(source.format.plugin)} if source.format.plugin is not None else {}),
        "variant": contents.variant,
        "base": {
            "model_type": source.base.config["model_type"],
            "kind": source.base.architecture.kind,
            "unused_tensors": list(source.base.unused),
        },
        "routing": contents.routing.to_json(),
        **contents.details,
        "top_k": contents.top_k,
        "kernel_sizes": list(contents.kernel_sizes),
        "adapted_linears": len(contents.adapters),
        "adapter_bytes": sum(tensor.nbytes for tensor in contents.tensors.values()) - sum(heads),
        "head_bytes": sum(heads),
        # float32 weights, each once; the graphs add a few hundred KiB
        "predicted_weight_bytes": sum(
            4 * math.prod(t.shape) for t in (*source.weights.values(), *source.routed_tensors)
        )
        + max(heads, default=0),
        "tasks": [
            {"id": i, **task.to_json(), "looks_trained": _looks_trained(source, i)}
            for i, task in enumerate(contents.tasks)
        ],
        "routes": {
            task.name: {p: route(a, i) for p, a in contents.adapters.items()}
            for i, task in enumerate(contents.tasks)
        },
        "notes": list(contents.notes),
    }


def route(adapter: Adapter, task_id: int) -> dict[str, Any] | None:
    """Return a task's experts, weights and margin in a linear; None: they depend on the input."""
    router = adapter.router
    if router is None:
        return None
    found = router.route(task_id)
    return {
        "experts": list(found.experts),
        "weights": list(found.weights),
        "margin": found.margin if math.isfinite(found.margin) else None,
    }


def _looks_trained(source: Any, task_id: int) -> bool | None:
    """Whether the task's embedding left its initial spread of 0.01 anywhere; a hint, no proof.

    Only decoders tell: in an encoder all rows move, as negatives of the contrastive loss. None
    where nothing tells: other variants start elsewhere, and with top-k 1 nothing moves.
    """
    if source.contents.variant != "released" or source.contents.top_k == 1:
        return None
    spreads = [
        float(adapter.router.embedding.numpy()[task_id].std())
        for path, adapter in source.contents.adapters.items()
        if adapter.router is not None and not path.startswith("encoder.")
    ]
    return max(spreads) > 0.015 if spreads else None
