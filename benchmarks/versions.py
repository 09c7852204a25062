"""Versions of what is measured: `python -m benchmarks.versions`, in every environment."""

from __future__ import annotations

import json
from importlib import metadata

__all__ = ["installed"]

_PACKAGES = (
    "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript", "optimum",
    "optimum-onnx", "torch", "transformers",
)  # fmt: skip


def installed() -> dict[str, str]:
    """Return the versions of those packages that this environment has."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    print(json.dumps(installed()))
