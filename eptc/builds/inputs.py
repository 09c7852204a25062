"""What a build depends on, as one hash: where it is equal, so would be what is built."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, get_args

import onnxruntime

from eptc.builds.plan import Build
from eptc.builds.state import digest, folder_hashes
from eptc.cache import code_hash
from eptc.describe import tool_versions
from eptc.errors import InputError
from eptc.files import sha256
from eptc.options import Options
from eptc.plugins import Group, installed
from eptc.recipe_schema import PATHS

__all__ = ["Inputs", "environment"]

_TOOLS = ("numpy", "onnx", "onnx-ir", "onnxscript", "tokenizers")


class Inputs:
    """Hashes what builds read, each file and folder once."""

    def __init__(self) -> None:
        self._found: dict[Path, Any] = {}

    def key(self, build: Build) -> str:
        """Return the hash of everything a build depends on: contents, options and versions."""
        files = Options(**build.recipe.options).inputs(build.ckpt).values()
        read = {str(path) for path in files if path is not None}
        options = {
            name: self._content(Path(value)) if name in PATHS and str(value) in read else value
            for name, value in build.recipe.options.items()
        }
        return digest([environment(), self._content(build.ckpt), options])

    def _content(self, path: Path) -> Any:
        path = path.resolve()
        if path not in self._found:
            try:
                self._found[path] = folder_hashes(path) if path.is_dir() else sha256(path)
            except OSError as error:
                raise InputError(
                    f"{error.filename or path} cannot be read: {error.strerror or error}"
                ) from error
        return self._found[path]


@functools.cache
def environment() -> str:
    """Return the hash of what builds here: eptc's code, its tools and what extends it."""
    home = Path(__file__).parents[1]
    # A link in a checkout, a folder in an installation.
    code = sorted([*home.rglob("*.py"), *(home / "passes").resolve().glob("*.py")])
    # Ranges and searched precisions follow from what it computes, and so does every verdict.
    tools = {**tool_versions(_TOOLS), "onnxruntime": onnxruntime.__version__}
    plugins = [str(plugin) for group in get_args(Group) for plugin in installed(group)]
    return digest([tools, code_hash(dict.fromkeys(code)), plugins])
