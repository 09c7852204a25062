"""The reference: the unfolded PyTorch model, loaded by code of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eptc.checkpoint import Checkpoint
from eptc.nn.adapted import ReferenceModel
from eptc.nn.streamed import StreamedModel
from eptc.passes.freeze_router import FreezeRouter
from eptc.runtime import Manifest

__all__ = ["frozen_gates", "load_reference", "stream_reference"]


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


def frozen_gates(manifest: Manifest) -> Mapping[str, Sequence[float]]:
    """Return the constant gates an engine was built with, by linear; none where it routes.

    What they are is a choice, like a precision: the reference is asked what it answers under
    them, and both sides are scored beside the model that routes.
    """
    for record in manifest.passes:
        if record["name"] == FreezeRouter.name:
            gates: Mapping[str, Sequence[float]] = record["options"]["gates"]
            return gates
    return {}
