"""The reference: the unfolded PyTorch model, loaded by code of its own."""

from __future__ import annotations

from collections.abc import Sequence

from eptc.checkpoint import Checkpoint
from eptc.nn import EptModel
from eptc.nn import load_reference as load
from eptc.nn.streamed import StreamedModel
from eptc.nn.streamed import stream_reference as stream
from eptc.tasks import Task

__all__ = ["load_reference", "stream_reference"]


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
    return load(
        source.path,
        source.base.path,
        top_k=top_k,
        tasks=_described(source, tasks),
        allow_pickle=allow_pickle,
    )


def stream_reference(
    source: Checkpoint,
    *,
    top_k: int | None,
    tasks: Sequence[str] | None,
    allow_pickle: bool = False,
) -> StreamedModel:
    """Load the reference of a checkpoint whose base stays on disk; arguments as above."""
    return stream(
        source.path,
        source.base.path,
        top_k=top_k,
        tasks=_described(source, tasks),
        allow_pickle=allow_pickle,
    )


def _described(source: Checkpoint, tasks: Sequence[str] | None) -> list[str | Task] | None:
    described = {task.name: task for task in source.contents.tasks}
    return [described.get(name, name) for name in tasks] if tasks is not None else None
