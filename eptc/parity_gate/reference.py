"""The reference: the unfolded PyTorch model, loaded by code of its own."""

from __future__ import annotations

from eptc.checkpoint import Checkpoint
from eptc.nn.adapted import ReferenceModel
from eptc.nn.streamed import StreamedModel

__all__ = ["load_reference", "stream_reference"]


def load_reference(source: Checkpoint) -> ReferenceModel:
    """Load the reference of a checkpoint: by what the caller said, not by what the reader made."""
    return source.format.reference(
        source.path, source.base.path, source.options, source.contents.tasks
    )


def stream_reference(source: Checkpoint) -> StreamedModel:
    """Load the reference of a checkpoint whose base stays on disk."""
    return source.format.stream(
        source.path, source.base.path, source.options, source.contents.tasks
    )
