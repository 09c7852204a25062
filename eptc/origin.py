"""What a bundle says of the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptc import checkpoint
from eptc.errors import BundleError, OptionError
from eptc.runtime import Manifest

__all__ = ["check_origin", "format_of"]


def format_of(folder: Path, recorded: Mapping[str, Any]) -> checkpoint.Format:
    """Return the format of the checkpoint that a bundle was made from.

    Raises:
        BundleError: a package reads it that is not installed.
    """
    try:
        return checkpoint.find_format(recorded["format"])
    except OptionError as error:
        if (origin := recorded.get("origin")) is None:
            raise
        package, _, version = origin.rpartition(" ")
        raise BundleError(
            f"{folder} was made from a checkpoint of the format {recorded['format']!r}, which the "
            f"package {package} reads, and it is not installed",
            fix=f"install {package} ({version} made the bundle)",
        ) from error


def check_origin(folder: Path, manifest: Manifest, source: checkpoint.Checkpoint) -> None:
    """Check that a checkpoint and its base are those that a bundle was made from.

    Raises:
        BundleError: one of them is another, or is read otherwise.
    """
    for what, recorded, found in (
        ("checkpoint", manifest.checkpoint["sha256"], source.sha256),
        ("base model", manifest.base["sha256"], source.base.sha256),
    ):
        if recorded != found:
            raise BundleError(
                f"{folder} was made from another {what}: SHA-256 {recorded[:16]}..., "
                f"the one given has {found[:16]}...",
                fix=f"give the {what} it was made from, or build it again",
            )
    # The hash covers the tensors; this is said beside them.
    given: dict[str, object] = {
        "variant": source.contents.variant,
        "top_k": source.contents.top_k,
        "kernel_sizes": list(source.contents.kernel_sizes),
    }
    for key, value in given.items():
        if manifest.checkpoint.get(key) != value:
            raise BundleError(
                f"{folder} was made with {key} {manifest.checkpoint.get(key)}, the checkpoint "
                f"given has {value}",
                fix="give the checkpoint it was made from, or build it again",
            )
