"""Recipes: they say what the command line can, and what they cannot say is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import hypothesis
import jsonschema
import pytest
from hypothesis import strategies as st

import eptc
from eptc.errors import RecipeError
from eptc.options import Options
from eptc.recipe_schema import recipe_schema

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "eptc" / "recipe.schema.json"

REFUSED: dict[str, tuple[str, str, str]] = {
    "no TOML": ("schema = 1\ntask = tone\n", "(at line 2, column 8)", "a TOML file"),
    "cut off": ('schema = 1\ntask = "to', "is no TOML", "a TOML file"),
    "a key twice": ('schema = 1\ntask = "a"\ntask = "b"\n', "line 3", "a TOML file"),
    "no schema": ('task = "tone"\n', "does not say which schema", "schema = 1"),
    "newer": ("schema = 2\nnew_key = 1\n", "line 1: the recipe has schema 2", "1 or older"),
    "schema as text": ('schema = "1"\n', "line 1: schema is '1'", "1"),
    "schema as truth": ("schema = true\n", "schema is True", "1"),
    "schema zero": ("schema = 0\n", "schema is 0", "1"),
    "unknown key": (
        'schema = 1\n\npresicion = "int8"\n',
        "line 3: there is no key 'presicion': did you mean 'precision'?",
        "ckpt, out, task",
    ),
    "unlike any key": ("schema = 1\nzzz = 1\n", "line 2: there is no key 'zzz'", "ckpt, out"),
    "as on the command line": (
        "schema = 1\nmax-drop = 1.0\n",
        "line 2: there is no key 'max-drop': did you mean 'max_drop'?",
        "max_drop",
    ),
    "a table": ("schema = 1\n[options]\n", "there is no key 'options'", "ckpt"),
    "a word for a number": ('schema = 1\ntop_k = "two"\n', "line 2: top_k is 'two'", "an integer"),
    "a fraction": ("schema = 1\ntop_k = 2.0\n", "line 2: top_k is 2.0", "an integer"),
    "truth for a number": ("schema = 1\nmax_drop = true\n", "max_drop is True", "a number"),
    "a number for truth": ("schema = 1\nverify = 0\n", "verify is 0", "true or false"),
    "a number for a path": ("schema = 1\nbase = 1\n", "base is 1", "a string"),
    "a date": ("schema = 1\nout = 2026-01-01\n", "out is datetime.date(", "a string"),
    "text for a list": ('schema = 1\ntasks = "a,b"\n', "tasks is 'a,b'", "a list, each item a st"),
    "a list of numbers": ("schema = 1\ntasks = [1]\n", "tasks is [1]", "each item a string"),
    "a precision": (
        'schema = 1\nprecision = "int-8"\n', "precision is 'int-8': did you mean 'int8'?", "int8",
    ),
    "too long a number": (f"schema = 1\ntop_k = {'9' * 5000}\n", "is no TOML", "a TOML file"),
    "more than any float": (f"schema = 1\nmax_drop = {'9' * 400}\n", "max_drop is 9", "a number"),
    "infinity": ("schema = 1\nmax_drop = inf\n", "line 2: max_drop is inf", "a number"),
    "no number": ("schema = 1\nmax_drop = nan\n", "max_drop is nan", "a number"),
    "no path": ('schema = 1\nprobe = "a\\u0000"\n', "line 2: probe is 'a\\x00'", "a path"),
    "options in the name of a pass": (
        'schema = 1\n[[passes]]\nname = "p:n=1"\n', "passes is [{'name': 'p:n=1'}]", "name",
    ),
    "no option of a pass": (
        'schema = 1\n[[passes]]\nname = "p"\n"n=1,m" = 2\n', "'n=1,m': 2", "name",
    ),
    "a pass without a name": ("schema = 1\n[[passes]]\nn = 3\n", "passes is [{'n': 3}]", "name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_recipe_can_say(case: str, tmp_path: Path, cli: Any) -> None:
    text, found, expected = REFUSED[case]
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        eptc.Recipe.read(file)
    assert found in caught.value.found
    assert str(file) in caught.value.found
    assert expected in str(caught.value.expected)
    done = cli("export", "--recipe", file, "-o", tmp_path / "out")
    assert (done.code, done.stdout) == (2, "")
    assert found in done.stderr
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [None, b"schema = 1\ntask = '\xff'\n"])
def test_what_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.toml"):
        eptc.Recipe.read(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        eptc.Recipe.read(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(b"\xef\xbb\xbfschema = 1\r\ntop_k = 2\r\n")
    assert eptc.Recipe.read(file).arguments == {"top_k": 2}


def test_a_line_is_named_only_where_it_is_known(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('schema = 1\nprobe = """\ntop_k = 1\n"""\ntop_k = "x"\n')
    with pytest.raises(RecipeError) as caught:
        eptc.Recipe.read(file)
    assert caught.value.found == f"{file}: top_k is 'x'"


def test_the_schema_is_of_every_option(cli: Any) -> None:
    """The file, what is printed, the options of a build and the command line all agree."""
    from eptc.cli import main

    printed = cli("recipe", "schema")
    assert printed.stdout == SCHEMA.read_text(), (
        "run: eptc recipe schema > eptc/recipe.schema.json"
    )
    schema = printed.json
    jsonschema.Draft202012Validator.check_schema(schema)
    names = {field.name for field in dataclasses.fields(Options)}
    assert set(schema["properties"]) == names | {"schema", "ckpt", "out"}
    for field in dataclasses.fields(Options):
        described = schema["properties"][field.name]
        assert described["description"]
        assert described.get("default", None) == (field.default or described.get("default"))
    export = main.get_command(click.Context(main), "export")
    assert export is not None
    parameters = {str(parameter.name) for parameter in export.params}
    assert names - {"verify"} | {"no_verify", "ckpt", "out"} <= parameters


# A value of each form that a key may have; what a file says is what a build is given.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "task": st.one_of(_TEXT, st.integers(0, 9), st.lists(_TEXT, min_size=1, max_size=3)),
    "tasks": st.lists(_TEXT, min_size=1, max_size=3),
    "precision": st.sampled_from(["int8", "fp16", "auto", "all"]),
    "top_k": st.integers(1, 9),
    "max_drop": st.floats(0, 100, exclude_min=True),
    "max_memory": st.integers(1, 10**15),
    "verify": st.just(False),
    "passes": st.lists(_TEXT, min_size=1, max_size=2),
    "format": _TEXT,
}


@hypothesis.given(st.fixed_dictionaries({}, optional=_VALUES))
@hypothesis.settings(
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow,
    ]
)  # fmt: skip
def test_round_trip(tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / "r.toml"
    eptc.Recipe(tmp_path / "ckpt", None, options).save(file)
    assert eptc.Recipe.read(file) == eptc.Recipe(tmp_path / "ckpt", None, options)


def test_defaults_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    eptc.Recipe(None, None, {**defaults, "passes": [], "top_k": 2, "max_flips": 0.0}).save(file)
    assert eptc.Recipe.read(file).arguments == {"top_k": 2, "max_flips": 0.0}


def test_a_number_is_one_however_it_is_written(tmp_path: Path) -> None:
    """What is built says it in the same digits."""
    file = tmp_path / "r.toml"
    for said in ("1", "1.0"):
        file.write_text(f"schema = 1\nmax_drop = {said}\n")
        assert json.dumps(eptc.Recipe.read(file).arguments) == '{"max_drop": 1.0}'


def test_a_saved_recipe_is_for_all_who_read_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        eptc.Recipe(None, None, {"top_k": 2}).save(tmp_path / "r.toml")
    finally:
        os.umask(before)
    assert (tmp_path / "r.toml").stat().st_mode & 0o777 == 0o644


def test_paths_begin_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones are relative to its folder, through links too; absolute ones stay so."""
    (tmp_path / "here").mkdir()
    (tmp_path / "far" / "recipes").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far" / "recipes")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "near" / "r.toml"
    eptc.Recipe(
        Path("ckpt"), Path("/abs/out"),
        {
            "base": "../base", "data": "~/d.jsonl", "genai_python": "python3",
            "probe": "../near/../probe.jsonl",  # beside what the link leads to
        },
    ).save(file)  # fmt: skip
    text = file.read_text()
    assert 'ckpt = "../../here/ckpt"' in text
    assert 'base = "../../base"' in text
    assert 'probe = "../probe.jsonl"' in text
    assert 'out = "/abs/out"' in text
    monkeypatch.chdir("/")
    (tmp_path / "here" / "ckpt").mkdir()
    found = eptc.Recipe.read(file)
    assert found.ckpt is not None
    assert found.ckpt.samefile(tmp_path / "here" / "ckpt")
    assert found.options["genai_python"] == "python3"
    monkeypatch.chdir(tmp_path / "near")
    eptc.Recipe(Path("~/ckpt"), None, {"base": "~"}).save(file)  # folders that are called so
    assert eptc.Recipe.read(file).arguments == {
        "ckpt": tmp_path / "near" / "~" / "ckpt", "base": tmp_path / "near" / "~",
    }  # fmt: skip
    file.write_text('schema = 1\nbase = "b"\ndata = "~/d"\ngenai_python = "e/bin/python"\n')
    assert eptc.Recipe.read(file).options == {
        "base": tmp_path / "near" / "b",
        "data": Path("/home/me/d"),
        "genai_python": tmp_path / "near" / "e" / "bin" / "python",
    }


def test_passes_with_options(tmp_path: Path) -> None:
    """A table says what `--pass` does, with values that text alone would mix up."""
    from eptc.added_passes import _options

    @dataclasses.dataclass(frozen=True)
    class Kind:
        largest: int = 1
        words: str = ""
        shape: tuple[int, ...] = ()

    file = tmp_path / "r.toml"
    file.write_text(
        'schema = 1\n[[passes]]\nname = "p"\nlargest = 3\nwords = "a,shape=[1]"\nshape = [1, 2]\n'
        '[[passes]]\nname = "q"\n'
    )
    first, second = eptc.Recipe.read(file).options["passes"]
    name, _, options = first.partition(":")
    assert (name, second) == ("p", "q")
    assert _options(name, Kind, options) == {
        "largest": 3, "words": "a,shape=[1]", "shape": (1, 2),
    }  # fmt: skip


def test_objects_have_no_place_in_a_file(tmp_path: Path) -> None:
    from eptc.passes.stable_names import StableNames

    with pytest.raises(RecipeError, match="an object of a program"):
        eptc.Recipe(options={"passes": [StableNames()]}).save(tmp_path / "r.toml")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_text_have_no_place_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no UTF-8"):
        eptc.Recipe(Path("/a/b\udcff")).save(tmp_path / "r.toml")
    assert list(tmp_path.iterdir()) == []


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("copy_native")
def test_a_saved_recipe_builds_the_same(
    tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, on the command line and in Python, moved together with what it names."""
    monkeypatch.chdir(tmp_path)
    given = ("in/ckpt", "--base", "in/base", "--task", "sentiment", "--precision", "int8")
    done = cli("export", *given, "-o", "first", "--save-recipe", "r.toml")
    assert done.code == 0, done.stderr
    assert cli("recipe", "check", "r.toml", "--json").json == {
        "ckpt": str(tmp_path / "in" / "ckpt"), "out": str(tmp_path / "first"),
        "task": "sentiment", "base": str(tmp_path / "in" / "base"), "precision": "int8",
    }  # fmt: skip
    again = cli("export", "--recipe", "r.toml", "-o", "second")
    assert again.code == 0, again.stderr
    assert _files(tmp_path / "first") == _files(tmp_path / "second")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "in", elsewhere / "in")
    shutil.move(tmp_path / "r.toml", elsewhere / "r.toml")
    eptc.export(**eptc.Recipe.read("elsewhere/r.toml").arguments)
    assert _files(tmp_path / "first") == _files(elsewhere / "first")


def test_what_is_given_beside_a_recipe_wins(small_native: Any, tmp_path: Path, cli: Any) -> None:
    """Even where it is the default; the rest is the recipe's."""
    file = tmp_path / "r.toml"
    file.write_text(
        f'schema = 1\nckpt = "nowhere"\nout = "elsewhere"\nbase = "{small_native.base}"\n'
        'task = "tone"\nprecision = "int4"\nverify = false\ntop_k = 2\n'
    )
    saved = tmp_path / "saved.toml"
    done = cli(
        "export", small_native.ckpt, "--recipe", file, "--precision", "fp32", "-o",
        tmp_path / "out", "--save-recipe", saved, "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.json["bundle"] == str(tmp_path / "out")
    assert (done.json["task"], done.json["parity"]["verified"]) == ("tone", False)
    assert eptc.Recipe.read(saved).options == {
        "task": "tone", "base": small_native.base, "top_k": 2, "verify": False,
    }  # fmt: skip


def test_a_recipe_is_saved_only_when_it_worked(
    small_native: Any, tmp_path: Path, cli: Any
) -> None:
    """Nothing is written where the build failed; a dry run writes nothing else."""
    given = ("export", small_native.ckpt, "--base", small_native.base, "-o", tmp_path / "out")
    saving = ("--save-recipe", tmp_path / "r.toml")
    assert cli(*given, "--task", "tune", *saving).code == 2
    assert list(tmp_path.iterdir()) == []
    done = cli(*given, "--task", "tone", *saving, "--dry-run")
    assert done.code == 0, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "r.toml"]
    assert (
        json.loads(cli("recipe", "check", tmp_path / "r.toml", "--json").stdout)["task"] == "tone"
    )


def test_a_link_to_itself_is_replaced(small_native: Any, tmp_path: Path, cli: Any) -> None:
    (tmp_path / "r.toml").symlink_to("r.toml")
    done = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "tone",
        "-o", tmp_path / "out", "--save-recipe", tmp_path / "r.toml", "--dry-run",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert eptc.Recipe.read(tmp_path / "r.toml").arguments["task"] == "tone"


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "there already": (lambda root: root / "there.toml", "is there already"),
    "a folder": (lambda root: root, "it is a folder"),
    "a device": (lambda _: Path("/dev/null"), "it is a device"),
    "no folder": (lambda root: root / "no" / "r.toml", "there is no folder"),
    "in the bundle": (lambda root: root / "out" / "r.toml", "would be in the output folder"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_are_checked_before_the_build(
    case: str, small_native: Any, tmp_path: Path, cli: Any
) -> None:
    place, message = PLACES[case]
    (tmp_path / "there.toml").write_text("mine")
    (tmp_path / "out").mkdir()
    done = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "tone",
        "-o", tmp_path / "out", "--save-recipe", place(tmp_path),
    )  # fmt: skip
    assert done.code == 2
    assert message in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_a_recipe_is_not_replaced_by_what_it_builds(
    small_native: Any, tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        f'schema = 1\nckpt = "{small_native.ckpt}"\nbase = "{small_native.base}"\n'
        'task = "tone"\nout = "."\n'
    )
    done = cli("export", "--recipe", file, "--force")
    assert done.code == 2
    assert "which --force would remove" in done.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_no_checkpoint_anywhere(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "r.toml").write_text("schema = 1\n")
    done = cli("export", "--recipe", tmp_path / "r.toml", "-o", tmp_path / "out")
    assert done.code == 2
    assert "Missing argument 'CKPT'" in done.stderr
    assert "Missing argument 'CKPT'" in cli("export").stderr


def test_the_schema_takes_what_recipes_say() -> None:
    """An editor that has the schema judges as a build does."""
    validator = jsonschema.Draft202012Validator(recipe_schema())
    assert validator.is_valid({"schema": 1, "task": ["a", 1], "passes": ["p", {"name": "q"}]})
    assert not validator.is_valid({"schema": 1, "tsak": "a"})
    assert not validator.is_valid({"schema": 2})
    assert not validator.is_valid({"task": "a"})
