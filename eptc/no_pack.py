"""What can be checked one by one: a bundle, not a pack."""

from __future__ import annotations

from pathlib import Path

from eptc.errors import OptionError
from eptc.runtime.spec import PACK

__all__ = ["check_no_pack"]


def check_no_pack(folder: Path) -> None:
    """Raise OptionError where a folder has a pack."""
    if (folder / PACK).exists():
        raise OptionError(
            f"{folder} is a pack, whose checks are not made one by one",
            expected="a bundle",
            fix="compare it with `eptc parity --task` without a report, or export the task by "
            "itself",
        )
