"""A checkpoint of either format, by what its folder holds: `read_stored`, `load_reference`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eptc.errors import CheckpointError, OptionError
from eptc.nn import native, released
from eptc.nn.config import EptConfig
from eptc.nn.model import EptModel
from eptc.nn.stored import Stored
from eptc.tasks import Task

__all__ = ["load_reference", "read_stored"]


def load_reference(
    checkpoint: str | Path,
    base_dir: str | Path,
    *,
    top_k: int | None = None,
    tasks: Sequence[str | Task] | None = None,
    allow_pickle: bool = False,
) -> EptModel:
    """Return a checkpoint of either format on its base, in eval mode.

    Args:
        checkpoint: a native folder, or one the authors' training script wrote.
        base_dir: the base model's folder.
        top_k: how many experts a task uses; needed for an authors' folder.
        tasks: tasks in the order of their ids; needed for an authors' folder.
        allow_pickle: whether `adapter_model.bin` may be read.

    Raises:
        OptionError: `top_k` or `tasks` is missing, or contradicts a native checkpoint.
        CheckpointError: the folder is no checkpoint, is damaged or does not fit the base.
        BaseModelError: the base cannot be used, or is another than the recorded one.
    """
    stored = read_stored(checkpoint, top_k=top_k, tasks=tasks, allow_pickle=allow_pickle)
    return EptModel.restore(stored, Path(base_dir))


def read_stored(
    checkpoint: str | Path,
    *,
    top_k: int | None = None,
    tasks: Sequence[str | Task] | None = None,
    allow_pickle: bool = False,
) -> Stored:
    """Return what a folder of either format holds; arguments and errors as `load_reference`."""
    directory = Path(checkpoint)
    formats = [name for name in (native.CONFIG, released.CONFIG) if (directory / name).is_file()]
    if len(formats) != 1:
        inner = sorted(path.parent for path in directory.glob(f"checkpoint-*/{released.CONFIG}"))
        raise CheckpointError(
            f"{directory} has {' and '.join(formats) or 'no checkpoint'}",
            expected=f"either {native.CONFIG} or {released.CONFIG}",
            fix=f"name one of its folders, such as {inner[-1]}" if inner else None,
        )
    if formats == [released.CONFIG]:
        return released.read(directory, top_k=top_k, tasks=tasks, allow_pickle=allow_pickle)
    stored = native.read(directory)
    _check_given(stored.config, top_k, tasks)
    return stored


def _check_given(config: EptConfig, top_k: int | None, tasks: Sequence[str | Task] | None) -> None:
    if top_k is not None and top_k != config.top_k:
        raise OptionError(f"top_k is {top_k}", expected=f"{config.top_k}, as the checkpoint says")
    if tasks is None:
        return
    given = [task.name if isinstance(task, Task) else task for task in tasks]
    names = [task.name for task in config.tasks]
    if given != names:
        raise OptionError(
            f"the tasks are {', '.join(given)}",
            expected=f"{', '.join(names)}, as the checkpoint says",
        )
