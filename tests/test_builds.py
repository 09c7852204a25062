"""Many builds of one plan: what is wrong is said first, what is killed goes on, nothing twice."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc.builds import BuildPlan, Outcome
from eptc.builds.inputs import Inputs, environment
from eptc.builds.one import run_order
from eptc.builds.outcome import Report, failed
from eptc.builds.run import make_orders
from eptc.builds.state import FOLDER, Place, Record, folder_hashes
from eptc.errors import BundleError, InputError, OutputError, ParityError, RecipeError
from eptc.passes.factor_pyramid import FactorPyramid

HEAD = 'schema = 1\nout = "engines/{task}-{precision}"\n[defaults]\nckpt = "in/ckpt"\n'
MATRIX = '[matrix]\ntask = ["tone", "same"]\nprecision = ["fp32", "int8"]\n'

REFUSED: dict[str, tuple[str, str, str]] = {
    "no TOML": (HEAD + "[matrix\n", "(at line 5", "a TOML file"),
    "newer": ("schema = 2\n", "line 1: the plan has schema 2", "1 or older"),
    "no schema": ('out = "x"\n', "does not say which schema", "schema = 1"),
    "unknown table": (
        HEAD + "[matrx]\n", "line 5: there is no key 'matrx': did you mean 'matrix'?", "defaults",
    ),
    "unknown default": (
        HEAD + 'presicion = "int8"\n' + MATRIX,
        "line 5: there is no key 'presicion': did you mean 'precision'?", "ckpt",
    ),
    "unknown axis": (
        HEAD + '[matrix]\ntasl = ["a"]\n', "line 6: there is no key 'tasl': did you mean 'task'?",
        "task",
    ),
    "no list": (HEAD + '[matrix]\ntask = "tone"\n', "line 6: task is 'tone'", "a list of values"),
    "empty list": (HEAD + "[matrix]\ntask = []\n", "task is []", "a list of values"),
    "unknown precision": (
        HEAD + '[matrix]\ntask = ["tone"]\nprecision = ["fp32", "int-8"]\n',
        "line 7: precision is 'int-8': did you mean 'int8'?", "int8-static",
    ),
    "a number for text": (HEAD + "base = 3\n" + MATRIX, "line 5: base is 3", "a string"),
    "no place": ("schema = 1\n[defaults]\n" + MATRIX, "out is None", "a pattern"),
    "unknown key in the place": (
        HEAD.replace("{task}", "{tsak}") + MATRIX,
        "line 2: out names {tsak}: did you mean 'task'?",
        "keys of a recipe",
    ),
    "code in the place": (HEAD.replace("{task}", "{task.x}") + MATRIX, "out names {task.x}", ""),
    "out of its root": (HEAD.replace("{task}", "{task}/../..") + MATRIX, "'..' behind a key", ""),
    "a task that is a path": (
        HEAD + '[matrix]\ntask = ["../tone"]\nprecision = ["fp32"]\n', "task = '../tone'",
        "a folder can be called",
    ),
    "where the records are": (
        HEAD.replace("{task}-{precision}", ".Eptc-{task}/x") + '[matrix]\ntask = ["build"]\n',
        "line 2: a build would be at .Eptc-build/x, where the records", "",
    ),
    "no place a file can have": (
        HEAD.replace("{task}", "\\u0000{task}") + MATRIX,
        "line 2: out is 'engines/\\x00{", "a path",
    ),
    "twice on a Mac, with an accent": (
        HEAD + '[matrix]\ntask = ["\u00e9", "e\u0301"]\nprecision = ["fp32"]\n',
        "at one place", "",
    ),
    "twice on a Mac, below others": (
        'schema = 1\nout = "e/{task}/{precision}"\n[defaults]\nckpt = "c"\n[matrix]\n'
        'task = ["a"]\nprecision = ["fp32"]\n[[include]]\ntask = "x"\nprecision = "fp32"\n'
        '[[include]]\ntask = "A"\nprecision = "fp32"\n',
        "builds 1 and 3 (the table 2 of [[include]]) would be at one place", "",
    ),
    "no key for the place": (
        HEAD + '[matrix]\nprecision = ["fp32"]\n', "a build has task = None", "",
    ),
    "one place twice": (
        HEAD.replace("-{precision}", "") + MATRIX,
        "builds 1 and 2 (task tone, precision int8) would be at one place: tone and tone",
        "a place of its own",
    ),
    "a value twice": (
        HEAD + '[matrix]\ntask = ["tone", "tone"]\nprecision = ["fp32"]\n', "at one place", "",
    ),
    "twice on a Mac": (
        HEAD + '[matrix]\ntask = ["tone", "Tone"]\nprecision = ["fp32"]\n', "at one place", "",
    ),
    "included twice": (
        HEAD + MATRIX + '[[include]]\ntask = "same"\nprecision = "int8"\n',
        "builds 4 and 5 (the table 1 of [[include]])", "",
    ),
    "excluded wrongly": (
        HEAD + MATRIX + '[[exclude]]\ntask = "tine"\n',
        "line 9: task 'tine' is excluded, and no build has it: did you mean 'tone'?", "same",
    ),
    "excluded by no axis": (
        HEAD + MATRIX + '[[exclude]]\ntarget = "lora"\n', "there is no key 'target'", "task",
    ),
    "excluding nothing": (HEAD + MATRIX + "[[exclude]]\n", "[[exclude]] says nothing", ""),
    "everything excluded": (
        HEAD + MATRIX + '[[exclude]]\ntask = "tone"\n[[exclude]]\ntask = "same"\n',
        "asks for no build", "",
    ),
    "nothing": (HEAD, "asks for no build", "[matrix]"),
    "a place for one": (HEAD + 'out = "x"\n' + MATRIX, "line 5: out is in the table defaults", ""),
    "no checkpoint": ('schema = 1\nout = "e/{task}"\n[matrix]\ntask = ["a"]\n', "no checkpoint",
                      "[defaults]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_are_none(case: str, tmp_path: Path, cli: Any) -> None:
    text, found, expected = REFUSED[case]
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        BuildPlan.read(file)
    assert found in caught.value.found
    assert expected in str(caught.value.expected)
    done = cli("build", file)
    assert (done.code, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_plan_asks_for(tmp_path: Path) -> None:
    """Every combination but the excluded ones, then the included; defaults where they mean."""
    file = tmp_path / "plan.toml"
    file.write_text(
        'schema = 1\nout = "~x/e/{target}/{task}-{precision}"\n'
        '[defaults]\nckpt = "c"\nbase = "/b"\ndata = "d.jsonl"\nmax_drop = 1\nprobe = "p.jsonl"\n'
        '[matrix]\ntask = ["a", 1]\nprecision = ["fp32", "int8"]\ntarget = ["onnx", "lora"]\n'
        '[[exclude]]\nprecision = "int8"\ntarget = "lora"\n'
        '[[exclude]]\ntask = 1\ntarget = "lora"\n'
        '[[include]]\ntask = "all"\nprecision = "fp16"\ndata = "other"\n'
    )
    plan = BuildPlan.read(file)
    assert plan.root == tmp_path / "~x" / "e"
    assert [build.name for build in plan.builds] == [
        "onnx/a-fp32", "lora/a-fp32", "onnx/a-int8", "onnx/1-fp32", "onnx/1-int8", "onnx/all-fp16",
    ]  # fmt: skip
    base = {"base": Path("/b")}
    lossy = {"data": tmp_path / "d.jsonl", "max_drop": 1.0}
    probe = {"probe": tmp_path / "p.jsonl"}
    first, lora, int8, *_, included = (dict(build.recipe.options) for build in plan.builds)
    assert first == base | probe | {"task": "a", "precision": "fp32", "target": "onnx"}
    assert lora == base | {"task": "a", "precision": "fp32", "target": "lora"} | (
        probe if "probe" in lora else {}
    )
    assert "data" not in lora
    assert int8 == base | probe | lossy | {"task": "a", "precision": "int8", "target": "onnx"}
    assert included == base | probe | lossy | {
        "task": "all", "precision": "fp16", "data": tmp_path / "other",
    }  # fmt: skip
    assert {build.ckpt for build in plan.builds} == {tmp_path / "c"}
    assert plan.builds[0].out == tmp_path / "~x" / "e" / "onnx" / "a-fp32"


def test_defaults_go_to_the_targets_that_take_them(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(
        'schema = 1\nout = "e/{target}"\n[defaults]\nckpt = "c"\nmax_rank = 4\n'
        'profile = ["batch=1:2:4"]\nlayout = "optimum"\n'
        '[matrix]\ntarget = ["onnx", "tensorrt", "lora", "triton"]\n'
    )
    found = {b.name: dict(b.recipe.options) for b in BuildPlan.read(file).builds}
    assert found == {
        "onnx": {"target": "onnx", "layout": "optimum"},
        "tensorrt": {"target": "tensorrt", "profile": ["batch=1:2:4"]},
        "lora": {"target": "lora", "max_rank": 4},
        "triton": {"target": "triton"},
    }


def test_text_is_for_frozen_routes_at_any_precision(tmp_path: Path) -> None:
    """They are averages over it; exact routes in float32 need none."""
    file = tmp_path / "plan.toml"
    file.write_text(
        'schema = 1\nout = "e/{routing}-{precision}"\n'
        '[defaults]\nckpt = "c"\ncalibration = "t.txt"\n'
        '[matrix]\nprecision = ["fp32", "int8-static"]\nrouting = ["exact", "frozen"]\n'
    )
    builds = BuildPlan.read(file).builds
    assert {b.name for b in builds if "calibration" in b.recipe.options} == {
        "frozen-fp32", "exact-int8-static", "frozen-int8-static",
    }  # fmt: skip


def _plan(root: Path, *lines: str, head: str = 'base = "in/base"\n') -> Path:
    """Write a plan beside the folders of a test; return its file."""
    file = root / "plan.toml"
    file.write_text(HEAD + head + "".join(f"{line}\n" for line in lines))
    return file


FIRST: dict[str, tuple[tuple[str, ...], str, str]] = {
    "an unknown task": (
        ('[matrix]\nprecision = ["fp32"]\ntask = ["tone", "tune"]',), "tune-fp32: ", "tone",
    ),
    "an unknown target": (
        ('[matrix]\nprecision = ["fp32"]\ntarget = ["onx"]\ntask = ["tone"]',),
        "the target is 'onx': did you mean 'onnx'?", "triton",
    ),
    "what contradicts": (
        ('top_k = 2\n[matrix]\nprecision = ["fp32"]\ntask = ["tone"]\nmax_rank = [3]',),
        "--max-rank 3 was given together with --target onnx", "lora",
    ),
    "what a target does not take": (
        ('target = "lora"', '[matrix]\nprecision = ["int8"]\ntask = ["tone"]'),
        "tone-int8: --precision int8 was given together with --target lora", "",
    ),
    "every precision at once": (
        ('[matrix]\nprecision = ["all"]\ntask = ["tone"]',), "the precision is 'all'", "int8",
    ),
    "a file that is not there": (
        ('data = "gone.jsonl"', '[matrix]\nprecision = ["int8"]\ntask = ["tone"]'),
        "the labelled data is not there", "",
    ),
    "a task of a repository": (
        ('target = "triton"', '[matrix]\nprecision = ["fp32"]\ntask = ["tone,tune"]'), "tune", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRST)
def test_what_is_wrong_is_said_before_anything_is_built(
    case: str, small_native: Any, tmp_path: Path, cli: Any
) -> None:
    lines, found, expected = FIRST[case]
    (tmp_path / "in").symlink_to(small_native.root / "in")
    good = '[[include]]\ntask = "score"\nprecision = "fp32"'
    done = cli("build", _plan(tmp_path, *lines, good))
    assert (done.code, done.stdout) == (2, "")
    assert found in done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "engines").exists()


def test_places_of_others_stay(copy_native: Any, tmp_path: Path, cli: Any) -> None:
    """What no plan built is replaced with --force alone; inputs never are."""
    plan = _plan(tmp_path, '[matrix]\nprecision = ["fp32"]\ntask = ["tone", "same"]')
    mine = tmp_path / "engines" / "same-fp32" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    done = cli("build", plan)
    assert done.code == 2
    assert "same-fp32" in done.stderr
    assert mine.read_text() == "mine"
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["same-fp32"]
    assert cli("build", plan, "--force").code == 0
    assert not mine.exists()
    text, before = plan.read_text(), sorted(copy_native.ckpt.iterdir())
    for place in ("in/ckpt/{task}", "in/{ckpt}/{task}"):
        plan.write_text(text.replace("engines/{task}", place))
        done = cli("build", plan, "--force")
        assert done.code == 2
        assert "is in the checkpoint" in done.stderr
        assert sorted(copy_native.ckpt.iterdir()) == before
    inside = tmp_path / "alone" / "plan.toml"
    inside.parent.mkdir()
    inside.write_text(
        f'schema = 1\nout = "."\n[[include]]\nckpt = "{copy_native.ckpt}"\n'
        f'base = "{copy_native.base}"\ntask = "tone"\n'
    )
    done = cli("build", inside, "--force")
    assert done.code == 2
    assert "is or holds the plan" in done.stderr
    assert list(inside.parent.iterdir()) == [inside]


def test_a_build_that_fails_stops_no_other(
    small_native: Any, small_rows: Any, tmp_path: Path, cli: Any
) -> None:
    """A failed gate is exit code 1, bad input 2; the rest is built, and only the rest is there."""
    (tmp_path / "in").symlink_to(small_native.root / "in")
    (tmp_path / "rows.jsonl").write_text('{"nothing": 1}\n')
    plan = _plan(
        tmp_path,
        f'data = "{small_rows.values}"\nmax_drop = 0.0',
        '[matrix]\nprecision = ["int8", "fp32"]\ntask = ["score"]',
        '[[include]]\nprecision = "int8"\ntask = "tone"\ndata = "rows.jsonl"',
        '[[include]]\nprecision = "fp32"\ntask = "tone"',
    )
    done = cli("build", plan, "--json")
    assert done.code == 1, done.stderr
    found = {build["name"]: build for build in done.json["builds"]}
    assert {name: build["exit_code"] for name, build in found.items()} == {
        "score-int8": 1, "score-fp32": 0, "tone-int8": 2, "tone-fp32": 0,
    }  # fmt: skip
    assert (done.json["built"], done.json["failed"]) == (2, 2)
    assert "expected: " in found["tone-int8"]["error"]
    places = {path.name for path in (tmp_path / "engines").iterdir()}
    assert places == {FOLDER, "score-fp32", "tone-fp32"}
    # Again: what failed is tried again, without the worst of them 2 is the worst.
    plan.write_text(plan.read_text().replace("max_drop = 0.0", "max_drop = 50.0"))
    done = cli("build", plan)
    assert done.code == 2
    assert "score-fp32: kept" in done.stderr
    assert "score-int8: built" in done.stderr
    assert "tone-int8" in done.stdout


def _states(plan: Path) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in eptc.build_all(plan).outcomes}


def _numbers(root: Path) -> dict[str, tuple[int, int]]:
    """The number and time of each bundle's manifest: what another build of it would change."""
    found = {}
    for path in sorted(root.glob("*/manifest.json")):
        status = path.stat()
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found


def _rename_base(root: Path) -> None:
    (root / "in" / "base").rename(root / "in" / "other")
    _edit(root / "plan.toml", "in/base", "in/other")


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def _record(root: Path, **changes: Any) -> None:
    path = root / "engines" / FOLDER / "tone-fp32.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda _: None, False),
    "the checkpoint's settings": (
        lambda root: _edit(root / "in" / "ckpt" / "ept_config.json", '"bad"', '"poor"'), True,
    ),
    "a default option": (
        lambda root: _edit(root / "plan.toml", "[matrix]", "top_k = 2\n[matrix]"), True,
    ),
    "the name of the base": (_rename_base, False),
    "a file's byte": (
        lambda root: _damage(root / "engines" / "tone-fp32" / "weights.bin"), True,
    ),
    "a file gone": (
        lambda root: (root / "engines" / "tone-fp32" / "config.json").unlink(), True,
    ),
    "a file more": (
        lambda root: (root / "engines" / "tone-fp32" / "more").write_text("x"), True,
    ),
    "the bundle gone": (lambda root: shutil.rmtree(root / "engines" / "tone-fp32"), True),
    "a build that was killed": (
        lambda root: Place(root / "engines", "tone-fp32").write(Record("building", "x")), True,
    ),
    "a newer record": (lambda root: _record(root, schema=2), True),
    "a record of no files": (lambda root: _record(root, files=["weights.bin"]), True),
}  # fmt: skip


@pytest.fixture(scope="module")
def built(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that was built: one engine."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(small_native.root / "in", root / "in")
    plan = _plan(root, '[matrix]\nprecision = ["fp32"]\ntask = ["tone"]')
    assert _states(plan) == {"tone-fp32": "built"}
    return root


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_kept(case: str, built: Path, tmp_path: Path, cli: Any) -> None:
    """A bundle that is whole and of the same inputs, wherever those are; nothing else."""
    change, again = CHANGES[case]
    root = tmp_path / "moved"
    shutil.copytree(built, root)
    change(root)
    plan = root / "plan.toml"
    force = ["--force"] if case in ("a newer record", "a record of no files") else []
    done = cli("build", plan, "--dry-run", *force)
    assert done.stdout == f"{'build' if again else 'keep'} {root / 'engines' / 'tone-fp32'}\n"
    done = cli("build", plan, "--json", *force)
    assert done.code == 0, done.stderr
    assert done.json["kept" if not again else "built"] == 1
    assert eptc.verify(root / "engines" / "tone-fp32").ok
    assert _states(plan) == {"tone-fp32": "kept"}


def test_every_option_and_every_file_counts(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what only a file says; not where it lies."""
    (tmp_path / "d.jsonl").write_text("1")
    text = 'data = "d.jsonl"\n[matrix]\nprecision = ["int8"]\ntask = ["tone"]'
    (tmp_path / "in").symlink_to(built / "in")

    def key() -> str:
        (build,) = BuildPlan.read(_plan(tmp_path, text)).builds
        return Inputs().key(build)

    first = key()
    (tmp_path / "d.jsonl").rename(tmp_path / "e.jsonl")
    text = text.replace("d.jsonl", "e.jsonl")
    assert key() == first
    (tmp_path / "e.jsonl").write_text("2")
    assert key() != first
    (tmp_path / "e.jsonl").write_text("1")
    assert key() == first
    with monkeypatch.context() as changed:
        changed.setattr("eptc.builds.inputs.environment", lambda: "another")
        assert key() != first
    text = "max_drop = 1.0\n" + text
    assert key() != first
    with socket.socket(socket.AF_UNIX) as pipe:
        pipe.bind(os.path.relpath(tmp_path / "s"))  # a short path
    text = text.replace("e.jsonl", "s")
    with pytest.raises(InputError, match="s cannot be read"):
        key()


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    """What file managers and version control leave beside the others is read by nobody."""
    (tmp_path / "weights").write_text("one")
    first = folder_hashes(tmp_path)
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    assert list(folder_hashes(tmp_path)) == list(first) == ["weights"]


def test_the_exit_code_is_the_worst() -> None:
    """A wrong engine before a bug before bad input; too little memory is the machine's."""
    found = {
        error: failed("a", Path("a"), kind(error))
        for error, kind in (
            ("off", ParityError),
            ("bug", ValueError),
            ("bad", InputError),
            ("full", MemoryError),
        )
    }
    assert {error: outcome.exit_code for error, outcome in found.items()} == {
        "off": 1, "bug": 70, "bad": 2, "full": 2,
    }  # fmt: skip
    for errors, code in ((("bad", "bug", "off"), 1), (("bad", "bug"), 70), (("full",), 2)):
        assert Report([found[error] for error in errors]).exit_code == code
    assert Report([Outcome("a", Path("a"), "kept")]).exit_code == 0


def test_linked_folders_count(tmp_path: Path) -> None:
    """Readers follow links, so what they lead to is read; not in a circle."""
    for name in ("ckpt", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    link = tmp_path / "ckpt" / "task"
    link.symlink_to("../one")
    (tmp_path / "one" / "back").symlink_to("../ckpt")
    first = folder_hashes(tmp_path / "ckpt")
    assert list(first) == ["task/weights", "weights"]
    link.unlink()
    link.symlink_to("../two")
    assert folder_hashes(tmp_path / "ckpt") != first
    (tmp_path / "two" / "weights").write_text("one")
    assert folder_hashes(tmp_path / "ckpt") == first


def test_what_computes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges, searches and verdicts are another ONNX Runtime's; passes and plugins count too."""
    code: list[Path] = []

    def hashed(paths: Any) -> str:
        code.extend(Path(path).resolve() for path in paths)
        return "one"

    def found() -> str:
        environment.cache_clear()
        return environment()

    monkeypatch.setattr("eptc.builds.inputs.code_hash", hashed)
    try:
        keys = [found()]
        monkeypatch.setattr("onnxruntime.__version__", "0")
        keys.append(found())
        monkeypatch.setattr("eptc.builds.inputs.installed", lambda group: (f"odd 1.2 of {group}",))
        keys.append(found())
        monkeypatch.setattr("eptc.builds.inputs.code_hash", lambda _: "two")
        keys.append(found())
        assert len(set(keys)) == 4
    finally:
        environment.cache_clear()
    for each in (FactorPyramid, Inputs):
        assert Path(inspect.getfile(each)).resolve() in code


@pytest.mark.usefixtures("copy_native")
def test_other_targets_are_kept_likewise(tmp_path: Path) -> None:
    """Folders with folders in them, whose content is no engine's."""
    plan = _plan(
        tmp_path,
        '[[include]]\ntask = "all"\nprecision = "fp32"\ntarget = "lora"',
        '[[include]]\ntask = "tone"\nprecision = "int8"\ntarget = "triton"',
    )
    assert _states(plan) == {"all-fp32": "built", "tone-int8": "built"}
    assert _states(plan) == {"all-fp32": "kept", "tone-int8": "kept"}
    _damage(next((tmp_path / "engines" / "tone-int8").rglob("weights.bin")))
    assert _states(plan) == {"all-fp32": "kept", "tone-int8": "built"}


@pytest.mark.usefixtures("copy_native")
def test_a_folder_that_came_meanwhile_stays(tmp_path: Path) -> None:
    """Between the check of the plan and the turn of the build."""
    plan = _plan(tmp_path, '[matrix]\nprecision = ["fp32"]\ntask = ["tone"]')
    (order,) = make_orders(BuildPlan.read(plan))
    order.build.out.mkdir(parents=True)
    (order.build.out / "notes.txt").write_text("mine")
    found = run_order(order)
    assert (found.state, found.exit_code) == ("failed", 2)
    assert [path.name for path in order.build.out.iterdir()] == ["notes.txt"]
    assert Place(order.root, order.build.name).read() is None


def test_other_packages_build_nothing_here(built: Path) -> None:
    """A machine of a cluster with another version says so."""
    import dataclasses

    (order,) = make_orders(BuildPlan.read(built / "plan.toml"))
    found = run_order(dataclasses.replace(order, environment="other"))
    assert (found.state, found.exit_code) == ("failed", 2)
    assert "another version of eptc" in str(found.error)


_COMMAND = "import sys; sys.argv[0] = 'eptc'; from eptc.cli import main; main()"
_FOUR = '[matrix]\nprecision = ["fp32", "int8"]\ntask = ["tone", "same"]'
_NAMES = {"tone-fp32", "tone-int8", "same-fp32", "same-int8"}


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def _until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def _nothing_half_written(engines: Path) -> None:
    """Every bundle is sound; no draft, no temporary file is left."""
    assert {path.name for path in engines.iterdir()} == _NAMES | {FOLDER}
    for name in _NAMES:
        assert eptc.verify(engines / name).ok
    suffixes = {path.suffix for path in (engines / FOLDER).iterdir()}
    assert suffixes == {".json", ".lock"}


def test_killed_half_way(copy_native: Any, tmp_path: Path, cli: Any) -> None:
    """What was finished is kept, the rest is built, as if nothing had happened."""
    plan, engines = _plan(tmp_path, _FOUR), tmp_path / "engines"
    process = _start("build", plan)
    # In the middle of the second build: it has begun to write.
    _until(lambda: list(engines.glob(".tone-int8.eptc-*/*")), process)
    process.kill()
    process.communicate()
    finished = {"tone-fp32", "same-fp32"}
    assert {path.name for path in engines.glob("[!.]*")} == finished
    with pytest.raises(BundleError):
        eptc.Engine.load(engines / "tone-int8")
    before = _numbers(engines)
    done = cli("build", plan, "--json")
    assert done.code == 0, done.stderr
    states = {build["name"]: build["state"] for build in done.json["builds"]}
    assert {name for name, state in states.items() if state == "kept"} == finished
    assert {name: _numbers(engines)[name] for name in finished} == before
    _nothing_half_written(engines)
    eptc.export(
        copy_native.ckpt, base=copy_native.base, task="tone", precision="int8",
        out=tmp_path / "alone",
    )  # fmt: skip
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (engines / "tone-int8" / path.name).read_bytes()


@pytest.mark.usefixtures("copy_native")
def test_two_at_once_share_the_work(tmp_path: Path) -> None:
    """Each build is made once, by one of them; the other keeps it."""
    plan = _plan(tmp_path, _FOUR)
    processes = [_start("build", plan, "--json") for _ in range(2)]
    reports = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        reports.append({build["name"]: build["state"] for build in json.loads(out)["builds"]})
    for name in _NAMES:
        assert sorted(report[name] for report in reports) == ["built", "kept"]
    _nothing_half_written(tmp_path / "engines")


@pytest.mark.usefixtures("copy_native")
def test_a_process_that_is_killed_takes_one_build_with_it(tmp_path: Path) -> None:
    """With several at a time the others go on, and it is made the next time."""
    plan = _plan(tmp_path, _FOUR)
    killed: list[int] = []

    def ended(_: Outcome) -> None:
        if not killed:
            process = multiprocessing.active_children()[0]
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    report = eptc.build_all(plan, jobs=2, ended=ended)
    states = [outcome.state for outcome in report.outcomes]
    assert sorted(states) == ["built", "built", "built", "failed"]
    assert report.exit_code == 2
    (lost,) = [outcome for outcome in report.outcomes if outcome.error]
    assert "was killed" in str(lost.error)
    assert multiprocessing.active_children() == []
    # It may have been done, and killed before it could say so.
    done = {order.build.name for order in make_orders(BuildPlan.read(plan)) if order.done}
    assert done >= _NAMES - {lost.name}
    again = eptc.build_all(plan, jobs=2)
    assert {o.name for o in again.outcomes if o.state == "built"} == _NAMES - done
    _nothing_half_written(tmp_path / "engines")


@pytest.mark.usefixtures("copy_native")
def test_a_failure_after_a_bundle_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a plan's, though nobody vouches for it: the next run builds it again unasked."""
    plan = _plan(tmp_path, '[matrix]\nprecision = ["fp32"]\ntask = ["tone"]')

    def interrupted(*args: Any, **options: Any) -> None:
        eptc.export(*args, **options)
        raise OSError("the disk is gone")

    with monkeypatch.context() as changed:
        changed.setattr("eptc.builds.one.export", interrupted)
        assert _states(plan) == {"tone-fp32": "failed"}
    assert (tmp_path / "engines" / "tone-fp32" / "manifest.json").exists()
    assert _states(plan) == {"tone-fp32": "built"}


@pytest.mark.usefixtures("copy_native")
def test_what_a_failed_build_found_stays(tmp_path: Path) -> None:
    """The bundle before it, and what is known of it; where there was none, nothing is claimed."""
    plan = _plan(tmp_path, '[matrix]\nprecision = ["int8"]\ntask = ["tone"]')
    assert _states(plan) == {"tone-int8": "built"}
    good = plan.read_text()
    (tmp_path / "rows.jsonl").write_text('{"nothing": 1}\n')
    _edit(plan, "[matrix]", 'data = "rows.jsonl"\n[matrix]')
    assert _states(plan) == {"tone-int8": "failed"}
    plan.write_text(good)
    assert _states(plan) == {"tone-int8": "kept"}
    shutil.rmtree(tmp_path / "engines")
    _edit(plan, "[matrix]", 'data = "rows.jsonl"\n[matrix]')
    assert _states(plan) == {"tone-int8": "failed"}
    mine = tmp_path / "engines" / "tone-int8" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    plan.write_text(good)
    with pytest.raises(OutputError):
        eptc.build_all(plan)
    assert mine.read_text() == "mine"


def _processes(group: int) -> list[str]:
    """Return the processes of a group; not those that ended and that nobody has waited for."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group = file.read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state not in b"ZX":
                found.append(file.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
@pytest.mark.usefixtures("copy_native")
def test_a_polite_end_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nor processes: those of `--jobs` end as well."""
    plan, engines = _plan(tmp_path, _FOUR), tmp_path / "engines"
    process = _start("build", plan, "--jobs", 2, "--json")
    _until(lambda: list(engines.glob(".*.eptc-*")), process)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted; what was built stays" in err
    assert json.loads(out)["exit_code"] == 130
    assert list(engines.glob(".*.eptc-*")) == []
    end = time.monotonic() + 300
    while left := _processes(process.pid):
        assert time.monotonic() < end, f"{left} are still there"
        time.sleep(0.01)


def test_jobs_and_ray(
    small_native: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").symlink_to(small_native.root / "in")
    plan = _plan(tmp_path, _FOUR)
    assert "--jobs is 0" in cli("build", plan, "--jobs", 0).stderr
    done = cli("build", plan, "--jobs", 2, "--ray")
    assert done.code == 2
    assert "--jobs 2 was given together with --ray" in done.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    done = cli("build", plan, "--ray")
    assert done.code == 2
    assert "pip install 'ept-compiler[ray]'" in done.stderr
    assert not (tmp_path / "engines").exists()
