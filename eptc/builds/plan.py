"""A plan: one TOML file that says what is built of what, in every combination."""

from __future__ import annotations

import dataclasses
import itertools
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc.builds.state import FOLDER
from eptc.comparison import TAKEN_BY
from eptc.errors import RecipeError
from eptc.interop.targets import COMMON, folder_target
from eptc.recipe_schema import check_keys, check_value, keys
from eptc.recipes import Recipe, read_values
from eptc.similar_names import did_you_mean
from eptc.toml_file import TomlFile

__all__ = ["Build", "BuildPlan"]

_VERSION = 1
_TOP = ("schema", "out", "defaults", "matrix", "include", "exclude")
# What text and labelled data are for beside a precision.
_FOR_FROZEN = ("calibration", "data", "max_drop", "max_flips")
# What one target alone takes.
_FOR_TARGET = {
    "build": "tensorrt", "genai_python": "genai", "layout": "onnx", "max_rank": "lora",
    "profile": "tensorrt", "tensorrt_version": "tensorrt",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Build:
    """One build of a plan.

    Args:
        name: its place below the plan's root.
        recipe: what is built; checkpoint and place are there.
    """

    name: str
    recipe: Recipe

    @property
    def out(self) -> Path:
        """Its place."""
        assert self.recipe.out is not None
        return self.recipe.out

    @property
    def ckpt(self) -> Path:
        """Its checkpoint."""
        assert self.recipe.ckpt is not None
        return self.recipe.ckpt


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """What a plan file asks for.

    Args:
        path: the file.
        root: the folder that every build's place is below.
        builds: all of them, in the file's order.
    """

    path: Path
    root: Path
    builds: tuple[Build, ...]

    @classmethod
    def read(cls, path: str | Path) -> BuildPlan:
        """Read a plan; its relative paths begin at its folder. Nothing else is read.

        Raises:
            RecipeError: it cannot be read, has a newer schema, an unknown key (the nearest is
                named) or a wrong value; it asks for nothing, or for two builds at one place.
        """
        file = TomlFile.read(path)
        file.check_version("plan", _VERSION)
        check_keys(file, "", file.data, _TOP)
        pattern = _Pattern.read(file)
        defaults = _table(file, "defaults")
        _refuse_out(file, "defaults", defaults)
        defaults = read_values(file, defaults, table="defaults")
        builds: list[Build] = []
        places: dict[str, int] = {}  # all are equally deep: none is inside another
        for number, (given, table) in enumerate(_chosen(file)):
            values = _taken(defaults, given) | given
            if values.get("ckpt") is None:
                raise RecipeError(
                    f"{file.path} names no checkpoint", expected="ckpt in the table [defaults]"
                )
            name = pattern.name(values)
            if (same := places.setdefault(_alike(name), number)) != number:
                raise RecipeError(
                    f"{file.path}: builds {same + 1} and {number + 1} ({table}) would be at "
                    f"one place: {builds[same].name} and {name}",
                    expected="a place of its own for each",
                    fix=f"name in out what they differ in: {{{'}, {'.join(given)}}}",
                )
            options = {key: value for key, value in values.items() if key != "ckpt"}
            recipe = Recipe(Path(values["ckpt"]), pattern.root / name, options)
            builds.append(Build(name, recipe))
        if not builds:
            raise RecipeError(
                f"{file.path} asks for no build",
                expected="a table [matrix] with lists, or [[include]], not all of it excluded",
            )
        return cls(file.path, pattern.root, tuple(builds))


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """Where builds go: a folder, and a name below it with keys in braces."""

    file: TomlFile
    root: Path
    rest: str

    @classmethod
    def read(cls, file: TomlFile) -> _Pattern:
        found = file.data.get("out")
        if not isinstance(found, str) or not found:
            raise file.error(
                f"out is {found!r}", key="out", expected='a pattern such as "engines/{task}"'
            )
        try:
            fields = list(string.Formatter().parse(found))
        except ValueError as error:
            raise file.error(f"out is {found!r}: {error}", key="out") from error
        for _, name, form, conversion in fields:
            if name is not None and (name not in keys() or form or conversion):
                raise file.error(
                    f"out names {{{name}}}{did_you_mean(name, keys())}", key="out",
                    expected="keys of a recipe alone, such as {task}",
                )  # fmt: skip
        parts = Path(found).parts
        file.place(found, key="out")
        fixed = list(itertools.takewhile(lambda part: "{" not in part, parts[:-1]))
        rest = Path(*parts[len(fixed) :]).as_posix()
        if ".." in Path(rest).parts:
            raise file.error(f"out is {found!r}, with '..' behind a key", key="out")
        return cls(file, file.place(str(Path(*fixed)), key="out"), rest)

    def name(self, values: Mapping[str, Any]) -> str:
        """Return the place of a build below the root."""
        from eptc.options import Options

        said: dict[str, str] = {}
        for _, key, _, _ in string.Formatter().parse(self.rest):
            if key is None:
                continue
            value = values.get(key, getattr(Options, key, None))
            text = Path(value).name if isinstance(value, Path) else _text(value)
            if not text or text in (".", "..") or any(part in text for part in "/\\\0"):
                raise self.file.error(
                    f"out names {{{key}}}, and a build has {key} = {value!r}", key="out",
                    expected="a value that a folder can be called",
                )  # fmt: skip
            said[key] = text
        name = self.rest.format_map(said)
        if Path(name.lower()).parts[:1] == (FOLDER,):
            raise self.file.error(
                f"a build would be at {name}, where the records of builds are", key="out"
            )
        return name


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _alike(name: str) -> str:
    """Return what names that some file system takes for one have in common."""
    return unicodedata.normalize("NFC", name).lower()


def _table(file: TomlFile, key: str) -> Mapping[str, Any]:
    found = file.data.get(key, {})
    if not isinstance(found, Mapping):
        raise file.error(f"{key} is {found!r}", key=key, expected=f"a table [{key}]")
    return found


def _tables(file: TomlFile, key: str) -> Sequence[Mapping[str, Any]]:
    found = file.data.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise file.error(f"{key} is {found!r}", key=key, expected=f"tables [[{key}]]")
    return found


def _refuse_out(file: TomlFile, table: str, given: Mapping[str, Any], number: int = 0) -> None:
    if "out" in given:
        raise file.error(
            f"out is in the table {table}", key="out", table=table, number=number,
            expected="one pattern for all builds, at the top of the file",
        )  # fmt: skip


def _chosen(file: TomlFile) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield what each build has beside the defaults, and where that is said."""
    axes = _axes(file)
    excluded = _excluded(file, axes)
    for values in itertools.product(*axes.values()) if axes else ():
        given = dict(zip(axes, values, strict=True))
        if not any(all(given[k] == v for k, v in rule.items()) for rule in excluded):
            yield given, ", ".join(f"{key} {_text(value)}" for key, value in given.items())
    for number, included in enumerate(_tables(file, "include")):
        _refuse_out(file, "include", included, number)
        yield (
            read_values(file, included, table="include", number=number),
            f"the table {number + 1} of [[include]]",
        )


def _axes(file: TomlFile) -> dict[str, list[Any]]:
    table = _table(file, "matrix")
    _refuse_out(file, "matrix", table)
    check_keys(file, "matrix", table, keys())
    axes: dict[str, list[Any]] = {}
    for key, items in table.items():
        if not isinstance(items, list) or not items:
            raise file.error(
                f"{key} is {items!r}", key=key, table="matrix", expected="a list of values"
            )
        for item in items:
            check_value(file, key, item, table="matrix")
        axes[key] = [read_values(file, {key: item}, table="matrix")[key] for item in items]
    return axes


def _excluded(file: TomlFile, axes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    rules = []
    for number, rule in enumerate(_tables(file, "exclude")):
        if not rule:
            raise file.error("a table [[exclude]] says nothing", key="exclude")
        check_keys(file, "exclude", rule, axes)
        found = read_values(file, rule, table="exclude", number=number)
        for key, value in found.items():
            if value not in axes[key]:
                known = [_text(item) for item in axes[key]]
                raise file.error(
                    f"{key} {_text(value)!r} is excluded, and no build has it"
                    + did_you_mean(_text(value), known),
                    key=key, table="exclude", number=number, expected=" or ".join(known),
                )  # fmt: skip
        rules.append(found)
    return rules


def _taken(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that mean something to a build; what it was given itself, it has to."""
    values = {**defaults, **given}
    target = folder_target(values.get("target", "onnx"), values.get("layout", "flat"))
    precision = values.get("precision", "fp32")
    frozen = values.get("routing") == "frozen"
    found = {}
    for key, value in defaults.items():
        means = target is None or key in COMMON | target.takes | {"ckpt", "layout"}
        if "precision" in given and not (frozen and key in _FOR_FROZEN):
            means = means and precision in TAKEN_BY.get(key, (precision,))
        if "target" in given:
            means = means and given["target"] == _FOR_TARGET.get(key, given["target"])
        if means:
            found[key] = value
    return found
