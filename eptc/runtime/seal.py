"""A manifest's hash of itself, by which what was changed in it later is found out.

Every other file has its hash in the manifest. The manifest says as much of what is answered: the
order of labels, a token id, the byte at which a weight begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from eptc.errors import BundleError

__all__ = ["SEAL", "check_seal", "sealed", "unsealed"]

SEAL: Final = "manifest_sha256"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with the hash of all the others as the last."""
    rest = unsealed(data)
    return {**rest, SEAL: _digest(rest)}


def unsealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values without the hash."""
    return {key: value for key, value in data.items() if key != SEAL}


def check_seal(data: Mapping[str, Any], *, required: bool) -> None:
    """Check that JSON values are those that were hashed.

    Args:
        data: the values.
        required: whether there must be a hash; one that is there must be right.

    Raises:
        BundleError: the hash is missing, or of something else.
    """
    if SEAL not in data:
        if required:
            raise BundleError(f"it has no {SEAL!r}", expected="the hash of what it says")
        return
    if (found := _digest(unsealed(data))) != data[SEAL]:
        raise BundleError(
            f"it was changed after it was written: the SHA-256 of what it says is {found[:16]}...",
            expected=f"{str(data[SEAL])[:16]}..., as its {SEAL!r} has it",
        )


def _digest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of JSON with sorted keys, no spaces and ASCII alone."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
