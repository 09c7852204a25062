"""Ranges that were observed before, kept by what they depend on."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from eptc.cache import cache_folder, code_hash
from eptc.examples_file import Example
from eptc.files import replacing
from eptc.runtime import Manifest

__all__ = ["key", "load", "store"]

logger = logging.getLogger(__name__)

# Graph, value: smallest and largest number.
Ends = Mapping[str, Mapping[str, tuple[float, float]]]


def key(
    manifest: Manifest,
    examples: Sequence[Example],
    values: Mapping[str, Sequence[str]],
    method: str,
) -> str:
    """Return the SHA-256 (hex) of everything that ranges depend on."""
    described = {
        "files": {name: record.sha256 for name, record in sorted(manifest.files.items())},
        "manifest": {**manifest.to_json(), "files": None, "passes": None, "parity": None},
        "examples": list(examples),
        "values": {graph: list(names) for graph, names in sorted(values.items())},
        "method": method,
        "tools": [importlib.metadata.version("ept-compiler"), onnxruntime.__version__, _code()],
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@functools.cache
def _code() -> str:
    """Return the SHA-256 of the code that observes."""
    return code_hash(sorted(Path(__file__).parent.glob("*.py")))


def _place(name: str) -> Path | None:
    folder = cache_folder()
    return folder / "ranges" / f"{name}.json" if folder is not None else None


def load(name: str) -> Ends | None:
    """Return the ranges kept under a key; None where there are none, or none that are whole."""
    path = _place(name)
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        if data["key"] != name:
            raise ValueError("it is another entry")
        return {graph: _ends(values) for graph, values in data["ranges"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return None


def _ends(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    found = {}
    for value, (low, high) in values.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"{value} goes from {low!r} to {high!r}")
        found[value] = float(low), float(high)
    return found


def store(name: str, ranges: Ends) -> None:
    """Keep ranges; where that cannot be done, they are observed again next time."""
    path = _place(name)
    if path is None:
        return
    content = json.dumps({"key": name, "ranges": ranges}).encode()
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        logger.info("the observed ranges are not kept in %s: %s", path.parent, error)
