"""A manifest's hash of itself, by which what was changed in it later is found out.

Every other file has its hash in the manifest. The manifest says as much of what is answered: the
order of labels, a token id, the byte at which a weight begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

from eptc.errors import BundleError

__all__ = ["SEAL", "read_sealed", "sealed", "unsealed"]


class _Versioned(Protocol):
    @property
    def schema_version(self) -> int: ...


Sealed = TypeVar("Sealed", bound=_Versioned)

SEAL: Final = "manifest_sha256"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with the hash of all the others as the last."""
    rest = unsealed(data)
    return {**rest, SEAL: _digest(rest)}


def unsealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values without the hash."""
    return {key: value for key, value in data.items() if key != SEAL}


def read_sealed(data: object, read: Callable[[object], Sealed], *, since: int) -> Sealed:
    """Return what JSON values say, if they are those that were hashed.

    Args:
        data: the values.
        read: makes it of the values without their hash. What it refuses says more than a hash:
            a newer version, an unknown key.
        since: the first schema version that must have a hash. One that is there must be right.

    Raises:
        BundleError: what `read` refuses, or the hash is missing, or of something else.
    """
    if not isinstance(data, Mapping):
        return read(data)
    found = read(unsealed(data))
    _check(data, required=found.schema_version >= since)
    return found


def _check(data: Mapping[str, Any], *, required: bool) -> None:
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
