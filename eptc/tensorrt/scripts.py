"""What lies beside a bundle for TensorRT: shapes, a build script, the commands of trtexec."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from eptc import bundle
from eptc.runtime.manifest import Manifest
from eptc.tensorrt import build_engine
from eptc.tensorrt.build_engine import PROFILES, TIMING_CACHE
from eptc.tensorrt.operators import Version, listed
from eptc.tensorrt.profiles import Profile, Ranges

__all__ = ["SCRIPT", "TRTEXEC", "trtexec", "write_scripts"]

SCRIPT = "build_engine.py"
TRTEXEC = "trtexec.sh"
# From it on every network is strongly typed, and nothing is said of it.
_ALWAYS_TYPED = (11, 0)

_HEAD = """\
#!/bin/sh
# Builds the TensorRT engines of this folder with trtexec, of TensorRT {version}.
# Precision is in the graphs: give no --fp16, --int8 or the like.
# Afterwards `python3 build_engine.py --record` writes down what they were built by and for.
set -eu
CDPATH= cd -- "$(dirname -- "$0")"
"""


def write_scripts(
    out: Path,
    manifest: Manifest,
    found: Ranges,
    shapes: Mapping[str, Profile],
    version: Version,
) -> None:
    """Write the files into a folder.

    Args:
        out: the folder.
        manifest: the bundle's.
        found: sizes by dimension.
        shapes: sizes by graph and input.
        version: TensorRT's.
    """
    known = listed(version)
    bundle.write_json(
        out / PROFILES,
        {
            "schema_version": 1,
            "tensorrt": ".".join(map(str, version)),
            "operators": ".".join(map(str, known.known)),
            "dimensions": {name: range_.to_json() for name, range_ in found.items()},
            "graphs": {
                role: {"file": manifest.graphs[role].file, "inputs": inputs}
                for role, inputs in shapes.items()
            },
        },
    )
    shutil.copyfile(build_engine.__file__, out / SCRIPT)
    (out / TRTEXEC).write_text(trtexec(manifest, shapes, version), "utf-8")


def trtexec(manifest: Manifest, shapes: Mapping[str, Profile], version: Version) -> str:
    """Return a shell script that builds every graph's engine.

    Args:
        manifest: the bundle's.
        shapes: sizes by graph and input.
        version: TensorRT's.
    """
    parts = [_HEAD.format(version=".".join(map(str, version)))]
    for role, inputs in shapes.items():
        arguments = [f"--onnx={manifest.graphs[role].file}"]
        if version < _ALWAYS_TYPED:
            arguments.append("--stronglyTyped")
        for bound in ("min", "opt", "max"):
            said = ",".join(f"{name}:{_size(each[bound])}" for name, each in inputs.items())
            arguments.append(f"--{bound}Shapes={said}")
        arguments += [f"--timingCacheFile={TIMING_CACHE}", f"--saveEngine={role}.engine"]
        arguments.append("--skipInference")
        parts.append(" \\\n  ".join(["trtexec", *map(shlex.quote, arguments)]) + "\n")
    return "\n".join(parts)


def _size(shape: list[int]) -> str:
    return "x".join(map(str, shape))
