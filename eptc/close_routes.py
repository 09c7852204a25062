"""Routes that other arithmetic could choose otherwise."""

from __future__ import annotations

from eptc.checkpoint import Checkpoint

__all__ = ["SMALL_MARGIN", "close_routes"]

# A log-probability gap below this can flip under other float32 arithmetic.
SMALL_MARGIN = 1e-4


def close_routes(source: Checkpoint, *task_ids: int) -> tuple[str, ...]:
    """Return a warning for each linear whose choice of experts is within rounding of another."""
    notes = []
    for path, adapter in source.contents.adapters.items():
        router = adapter.router
        if router is None:
            continue
        for task_id in task_ids:
            margin = router.route(task_id).margin
            if margin < SMALL_MARGIN:
                task = source.contents.tasks[task_id].name
                notes.append(
                    f"{path}{f', task {task}' if len(task_ids) > 1 else ''}: the last expert "
                    f"chosen leads by only {margin:.1e} in log probability; arithmetic in "
                    "bfloat16 may choose another"
                )
    return tuple(notes)
