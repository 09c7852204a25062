"""A pytest plugin: `pytest --eptc-bundle DIR --eptc-reference CKPT` runs one test per check.

pytest imports this module wherever eptc is installed: without its options it does nothing, and
loads nothing but itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]

# Of the command line: what follows `--eptc-`, what stands for its value, and what it is.
_PATHS = {
    "bundle": "folder of the bundle, or the pack, to check",
    "reference": "folder of the checkpoint it was made from",
    "base": "folder of the base model",
    "data": "JSON lines file with labelled examples to score on",
    "task-spec": "JSON file with prompts and labels of tasks that are not the published ones",
}
# Of the configuration file, by what they are in `eptc.checks.Limits`, each with its largest value.
_LIMITS = {
    "relative": (
        "eptc_tolerance",
        "how far an output may be off, of its largest element",
        math.inf,
    ),
    "cosine": (
        "eptc_min_cosine",
        "smallest cosine between an output and the reference's",
        math.inf,
    ),
    "max_drop": ("eptc_max_drop", "points of the metric that may be lost on --eptc-data", 100.0),
    "max_flips": (
        "eptc_max_flips",
        "share of --eptc-data, such as 1%, whose label may change",
        1.0,
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("eptc", "parity of a compiled bundle with its checkpoint")
    for name, what in _PATHS.items():
        group.addoption(f"--eptc-{name}", type=Path, metavar="PATH", help=what)
    group.addoption("--eptc-tasks", metavar="NAMES", help="task names in id order, with commas")
    group.addoption("--eptc-top-k", type=int, metavar="N", help="experts a task uses")
    group.addoption("--eptc-format", metavar="NAME", help="format of the checkpoint")
    group.addoption("--eptc-allow-pickle", action="store_true", help="read .bin files")
    for key, what, _ in _LIMITS.values():
        parser.addini(key, f"eptc: {what}; without it, what the bundle was built with")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that cannot be right before anything is loaded."""
    config.addinivalue_line("markers", "eptc: a check of the bundle given with --eptc-bundle")
    given = {name: config.getoption(f"--eptc-{name}") for name in _PATHS}
    if given["bundle"] is None:
        if named := [f"--eptc-{name}" for name, path in given.items() if path is not None]:
            raise pytest.UsageError(f"{named[0]} was given without --eptc-bundle")
        return
    if given["reference"] is None:
        raise pytest.UsageError("--eptc-bundle needs --eptc-reference, the checkpoint's folder")
    for name, path in given.items():
        if path is not None and not path.exists():
            raise pytest.UsageError(f"--eptc-{name} is {path}, which does not exist")
    _limits(config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the checks behind the user's own tests; `-k` and `-m eptc` choose among them."""
    bundle = config.getoption("--eptc-bundle")
    if bundle is None:
        return
    from eptc.pytest_items import collect

    tasks = config.getoption("--eptc-tasks")
    options: Mapping[str, Any] = {
        "reference": config.getoption("--eptc-reference"),
        "base": config.getoption("--eptc-base"),
        "data": config.getoption("--eptc-data"),
        "task_spec": config.getoption("--eptc-task-spec"),
        "tasks": None if tasks is None else [name.strip() for name in tasks.split(",")],
        "top_k": config.getoption("--eptc-top-k"),
        "format": config.getoption("--eptc-format"),
        "allow_pickle": config.getoption("--eptc-allow-pickle"),
    }
    items += collect(session, bundle, options, _limits(config))


def _limits(config: pytest.Config) -> dict[str, float]:
    """Return what the configuration file allows, by its name in `eptc.checks.Limits`."""
    found = {}
    for name, (key, _, most) in _LIMITS.items():
        text = str(config.getini(key) or "").strip()
        if not text:
            continue
        try:
            found[name] = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise pytest.UsageError(f"{key} is {text!r}; expected a number") from None
        if not (0 <= found[name] <= most and math.isfinite(found[name])):  # NaN is not either
            wanted = "of 0 or more" if math.isinf(most) else f"from 0 to {most:g}"
            raise pytest.UsageError(f"{key} is {text!r}; expected a number {wanted}")
    return found
