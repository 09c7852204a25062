"""The reference: the unfolded PyTorch model, loaded by code of its own."""

from __future__ import annotations

from collections.abc import Sequence

from eptc.checkpoint import Checkpoint
from eptc.nn import EptModel
from eptc.nn import load_reference as load

__all__ = ["load_reference"]


def load_reference(
    source: Checkpoint,
    *,
    top_k: int | None,
    tasks: Sequence[str] | None,
    allow_pickle: bool = False,
) -> EptModel:
    """Load the reference of a checkpoint.

    Args:
        source: the checkpoint, for its folders and for what its tasks look like.
        top_k: as the caller gave it, not as the reader understood it.
        tasks: likewise, so that a reader that mixes up tasks is found out.
        allow_pickle: whether `adapter_model.bin` may be read.
    """
    described = {task.name: task for task in source.contents.tasks}
    return load(
        source.path,
        source.base.path,
        top_k=top_k,
        tasks=[described.get(name, name) for name in tasks] if tasks is not None else None,
        allow_pickle=allow_pickle,
    )
