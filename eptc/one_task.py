"""What can be checked one by one: an engine of one task."""

from __future__ import annotations

from pathlib import Path

from eptc.errors import BundleError, OptionError
from eptc.runtime.manifest import read_manifest
from eptc.runtime.spec import PACK

__all__ = ["check_one_task"]


def check_one_task(folder: Path) -> None:
    """Check that a folder has no engine of several tasks; one that cannot be read passes.

    Raises:
        OptionError: it has, or a pack.
    """
    if (folder / PACK).exists():
        raise OptionError(
            f"{folder} is a pack, whose checks are not made one by one",
            expected="a bundle of one task",
            fix="compare it with `eptc parity --task` without a report, or export the task by "
            "itself",
        )
    try:
        tasks = read_manifest(folder).tasks
    except BundleError:
        return  # a check of its own says why
    if tasks:
        raise OptionError(
            f"{folder} serves {len(tasks)} tasks, and its checks are not made one by one",
            expected="a bundle of one task",
            fix="compare it with `eptc parity` without a report, which compares every task, or "
            "export each task by itself",
        )
