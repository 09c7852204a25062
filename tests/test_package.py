"""The distribution: everything that is needed is in the wheel, and nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import eptc
from eptc.nn import EptConfig

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "eptc" / "checkpoint" / "ept_config.schema.json"


def _sources() -> Iterator[str]:
    """Every file of the package, by its place in a wheel."""
    for folder, prefix in ((ROOT / "eptc", "eptc"), (ROOT / "passes", "eptc/passes")):
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            hidden = any(part.startswith((".", "__pycache__")) for part in inside.parts)
            if path.is_file() and not hidden and inside.parts[0] != "passes":
                yield f"{prefix}/{inside.as_posix()}"


def test_the_wheel_has_every_file_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(_sources())
    assert {"eptc/py.typed", "eptc/passes/fold_pyramid.py"} <= names
    assert "eptc/checkpoint/ept_config.schema.json" in names
    assert not any(re.search(r"(^|/)(tests?/|test_|conftest)", name) for name in names)
    assert {"eptc/page/templates/page.html", "eptc/pytest_plugin.py"} <= names
    assert "eptc/tensorrt/operators.json" in names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"ept_compiler-{eptc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"ept_compiler-{eptc.__version__}.dist-info"
        entries = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert re.search(r"\[console_scripts\]\s+eptc = eptc\.cli:main", entries)
    assert re.search(r"\[pytest11\]\s+eptc = eptc\.pytest_plugin", entries)
    assert "Provides-Extra: compile" in metadata
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(?![^\n]*extra ==)", metadata, re.MULTILINE)
    assert set(required) <= {
        "click", "numpy", "onnxruntime", "onnxruntime-gpu", "rich", "tokenizers",
    }  # fmt: skip


def test_the_wheel_works_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    """Unpacked far from the sources: the link is gone and the passes are there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import eptc, eptc.passes.fold_pyramid as p, eptc.checkpoint.native as n;"
        "print(eptc.__file__, p.__file__, p.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        str(tmp_path / "eptc" / "__init__.py"),
        str(tmp_path / "eptc" / "passes" / "fold_pyramid.py"),
        "eptc.passes.fold_pyramid",
    ]


def test_every_package_is_listed() -> None:
    """The list in pyproject.toml is explicit; a folder that is not in it would be left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {"eptc.passes"} | {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "eptc").rglob("__init__.py")
        if "passes" not in path.parts
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found
    assert project["project"]["version"] == eptc.__version__
    assert importlib.metadata.version("ept-compiler") == eptc.__version__


def test_the_folder_of_passes_refuses_another_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError: passes/ is the package eptc.passes" in done.stderr
    assert "write `import eptc.passes`" in done.stderr


def test_the_link_to_the_passes() -> None:
    """A link in git too, and a relative one: mode 120000."""
    assert (ROOT / "eptc" / "passes").readlink() == Path("../passes")
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        [git, "ls-files", "--stage", "eptc/passes"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.startswith("120000 ")


def _schema() -> Any:
    return json.loads(SCHEMA.read_text())


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(_schema())


def test_schema_and_configuration_agree(golden: Path, small_native: Any, tmp_path: Path) -> None:
    """On a converted checkpoint, on a trained one, and on what either refuses."""
    folder = golden / "ept" / "t5-tiny"
    tasks = json.loads((folder / "meta.json").read_text())["tasks"]
    eptc.convert(
        folder / "adapter", base=folder / "base", out=tmp_path / "c", top_k=2, tasks=tasks
    )
    validator = jsonschema.Draft202012Validator(_schema())
    for directory in (tmp_path / "c", small_native.ckpt):
        config = json.loads((directory / "ept_config.json").read_text())
        validator.validate(config)
        assert EptConfig.from_json(config).to_json() == config
        assert set(config) <= set(_schema()["properties"])
        for key in _schema()["required"]:
            less = {name: value for name, value in config.items() if name != key}
            assert not validator.is_valid(less)
        more = {**config, "colour": "red"}
        assert not validator.is_valid(more)
        with pytest.raises(Exception, match="colour"):
            EptConfig.from_json(more)


def test_schema_and_tasks_have_the_same_fields() -> None:
    import dataclasses

    from eptc.tasks import Task

    described = _schema()["properties"]["tasks"]["items"]["properties"]
    assert set(described) == {field.name for field in dataclasses.fields(Task)}
