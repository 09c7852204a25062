"""Packages that extend eptc and go wrong: who is named, and what is left alone."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir
import pytest

import eptc
from eptc import checkpoint, planning
from eptc.errors import CheckpointError, OptionError, ParityError, PluginError
from eptc.ir import AdaptedModel
from eptc.option_values import option_value
from eptc.pass_base import AdapterPass, Contract, GraphPass
from eptc.plugins import GROUPS, installed

Package = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Return a function that installs a package of one module: what pip would leave behind."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def install(group: str, name: str, code: str, attribute: str = "It", dist: str = "odd") -> str:
        module = f"{dist}_{tmp_path.name}_{len(modules)}".replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(code)
        info = site / f"{dist}-1.2.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[{group}]\n{name} = {module}:{attribute}\n")
        return f"{name!r} of {dist} 1.2 ({module}:{attribute})"

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def _export(folders: Any, out: Path, **options: Any) -> Any:
    options = {"task": "tone", **options}
    return eptc.export(folders.ckpt, base=folders.base, out=out, **options)


def _unpublished(folder: Path) -> bool:
    """Whether neither a bundle nor a draft of one is there."""
    return not [p for p in folder.iterdir() if p.name.startswith((".out", "out"))]


# ---- any group

READER = """
import threading
from eptc.checkpoint.formats import Native
class It(Native):
    name = "mine"
    def __init__(self): self.lock = threading.Lock()
"""
BROKEN: dict[str, tuple[str, str]] = {
    "import": ("import nothing_of_that_name", "it cannot be imported: ModuleNotFoundError"),
    "raises": ("1 / 0", "it cannot be imported: ZeroDivisionError"),
    "no such thing": ("", "it cannot be imported: AttributeError"),
    "no object": ("It = 3", "it is a int, not a "),
    "another class": ("class It: name = 'mine'", "it is a It, not a "),
    "constructor": (
        "class It:\n def __init__(self): raise KeyError(1)",
        r"It\(\) fails: KeyError",
    ),
    "another name": (READER.replace('"mine"', '"yours"'), "it calls itself 'yours'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reader(
    case: str, package: Package, copy_native: Any, tmp_path: Path, cli: Any
) -> None:
    """It is named where it is asked for, or might have been the one; else nobody notices."""
    code, words = BROKEN[case]
    called = package("eptc.readers", "mine", code)
    with pytest.raises(PluginError, match=words) as caught:
        checkpoint.read(copy_native.ckpt, copy_native.base, format="mine")
    assert called in str(caught.value)
    assert "update or uninstall odd" in str(caught.value)
    assert checkpoint.read(copy_native.ckpt, copy_native.base).contents.format == "native"
    (tmp_path / "strange").mkdir()
    with pytest.raises(CheckpointError, match=words):
        checkpoint.detect(tmp_path / "strange")
    state = cli("doctor", "--json").json["readers"]["mine (odd 1.2)"]
    assert state.startswith("cannot be used: ")


def test_names_of_eptc_are_taken(
    package: Package, copy_native: Any, tmp_path: Path, cli: Any
) -> None:
    """Its own one is used, whatever is installed; the other one is said to be useless."""
    package("eptc.readers", "native", READER.replace('"mine"', '"native"'))
    package("eptc.targets", "onnx", "1 / 0")
    called = package("eptc.passes", "fold-pyramid", "1 / 0")
    built = _export(copy_native, tmp_path / "out", verify=False, format="native")
    assert built.manifest.target == "onnx"
    assert "origin" not in built.manifest.checkpoint
    with pytest.raises(PluginError, match="taken by a pass of eptc's own") as caught:
        _export(copy_native, tmp_path / "out2", passes=["fold-pyramid"])
    assert called in str(caught.value)
    report = cli("doctor", "--json").json
    for section, name in (("readers", "native"), ("passes", "fold-pyramid"), ("targets", "onnx")):
        assert "taken by" in report[section][f"{name} (odd 1.2)"]
    assert report["targets"]["onnx"] == "ready"
    (tmp_path / "strange").mkdir()
    with pytest.raises(CheckpointError, match=r"'native' of odd 1\.2 .* taken"):
        checkpoint.detect(tmp_path / "strange")


@pytest.mark.parametrize(
    ("group", "option"), [("readers", "format"), ("passes", "passes"), ("targets", "target")]
)
def test_two_packages_with_one_name(
    group: str, option: str, package: Package, copy_native: Any, tmp_path: Path, cli: Any
) -> None:
    for dist in ("odd", "even"):
        package(f"eptc.{group}", "mine", READER, dist=dist)
    with pytest.raises(PluginError, match=r"'mine' is in even 1\.2 and in odd 1\.2"):
        _export(
            copy_native, tmp_path / "out", **{option: ["mine"] if group == "passes" else "mine"}
        )
    assert _unpublished(tmp_path)
    _export(copy_native, tmp_path / "out", verify=False)
    shown = cli("doctor").stdout
    assert all(f"mine ({dist} 1.2): cannot be used" in shown for dist in ("odd", "even"))


def test_names_that_nobody_has(package: Package, copy_native: Any, tmp_path: Path) -> None:
    package("eptc.readers", "mine", READER)
    package("eptc.passes", "tidy-up", PASS)
    package("eptc.targets", "phone", TARGET)
    for options, words in (
        ({"format": "zip"}, "native or .* or mine"),
        ({"passes": ["tidyup"]}, "did you mean 'tidy-up'"),
        ({"target": "watch"}, "onnx or tensorrt or lora or .* or phone"),
        ({"passes": ["stable-names"]}, "a pass of eptc's own"),
    ):
        with pytest.raises(OptionError, match=words):
            _export(copy_native, tmp_path / "out", **options)


def test_nothing_is_looked_for_without_need(
    copy_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("entry points were searched")

    monkeypatch.setattr("importlib.metadata.entry_points", refuse)
    assert GROUPS
    with pytest.raises(AssertionError):
        installed("eptc.readers")
    _export(copy_native, tmp_path / "out", verify=False)


# ---- readers


@pytest.mark.parametrize("own_process", [False, True])
def test_the_process_that_verifies_finds_the_reader(
    own_process: bool,
    package: Package,
    copy_native: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its entry point: this one holds a lock, which cannot be pickled."""
    package("eptc.readers", "mine", READER)
    if own_process:
        monkeypatch.setattr(planning, "_LARGE", 0)
    built = _export(copy_native, tmp_path / "out", format="mine")
    assert built.manifest.parity["passed"]
    assert built.manifest.checkpoint["format"] == "mine"
    assert built.manifest.checkpoint["origin"] == "odd 1.2"
    assert built.manifest.tools["odd"] == "1.2"


FAILURES = {
    "matches": ("def matches(self, path): raise OSError('gone')", "OSError: gone"),
    "read": ("def read(self, *given): return {}['key']", "it cannot read .*KeyError: 'key'"),
    "contents": ("def read(self, *given): return {}", "it reads a dict, not Contents"),
    "reference": ("def reference(self, *given): raise OSError('gone')", "OSError: gone"),
    "no reference": ("def reference(self, *given): return 3", "its reference is a int"),
    "pickle": (
        "def read(self, *given):\n"
        "  import dataclasses\n"
        "  return dataclasses.replace(super().read(*given), details={'f': lambda: 0})",
        "what it read cannot be pickled",
    ),
    "layers": (
        "def reference(self, *given):\n"
        "  found = super().reference(*given)\n"
        "  next(iter(found.layers.values())).delta = None\n"
        "  return found",
        "its reference fails: TypeError",
    ),
    "hf": (
        "def reference(self, *given):\n"
        "  found = super().reference(*given)\n"
        "  found.hf.forward = None\n"
        "  return found",
        "its reference cannot be compared with: TypeError",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_reader_that_fails(
    case: str,
    package: Package,
    copy_native: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2: no bug of eptc's, and nobody's input; in whichever process it happens."""
    code, words = FAILURES[case]
    called = package("eptc.readers", "mine", READER + "    " + code.replace("\n", "\n    "))
    monkeypatch.setattr(planning, "_LARGE", 0)
    if case == "matches":
        (copy_native.ckpt / "ept_config.json").unlink()
        with pytest.raises(CheckpointError, match=words) as found:
            checkpoint.detect(copy_native.ckpt)
        assert called in str(found.value)
        return
    with pytest.raises(PluginError, match=words) as caught:
        _export(copy_native, tmp_path / "out", format="mine")
    assert called in str(caught.value)
    assert caught.value.exit_code == 2
    assert _unpublished(tmp_path)


# ---- passes

PASS = """
import dataclasses
from typing import ClassVar
from eptc.pass_base import AdapterPass, GraphPass
@dataclasses.dataclass(frozen=True)
class It(GraphPass):
    name: ClassVar[str] = "tidy-up"
    contract: ClassVar[str] = "exact"
    times: int = 1
    def rewrite(self, model): return 0
"""
MATMUL = "first = next(n for n in model.graph if n.op_type == 'MatMul')\n        "
WRONG = {
    "scales": (
        PASS.replace(
            "return 0",
            "\n        import numpy as np\n        from eptc.lower.edit import constant, insert\n"
            "        node = next(n for n in reversed(model.graph) if n.op_type == 'Add')\n"
            "        two = constant(model.graph, np.array(1.5, np.float32))\n"
            "        node.replace_input_with(1, insert(node, 'Mul', [node.inputs[1], two])"
            ".outputs[0])\n        return 1",
        ),
        ParityError,
        "the pass tidy-up of odd 1.2 is the first step after which the engine is off: report it "
        "to the authors of odd 1.2",
    ),
    "does not load": (
        PASS.replace(
            "return 0",
            f"\n        {MATMUL}first.domain = 'nobody'\n"
            "        model.graph.opset_imports['nobody'] = 1\n        return 1",
        ),
        ParityError,
        "does not load.*the pass tidy-up of odd 1.2 is the first step",
    ),
    "not valid": (
        PASS.replace("return 0", f"\n        {MATMUL}first.op_type = 'MatMull'\n        return 1"),
        PluginError,
        "the pass tidy-up of odd 1.2 on model broke the model: .*report it to the authors",
    ),
    "renames an output": (
        PASS.replace("return 0", "model.graph.outputs[0].name = 'scores'; return 1"),
        PluginError,
        "the pass tidy-up of odd 1.2 changed the interface of model",
    ),
    "raises": (
        PASS.replace("return 0", "raise type('Oops', (Exception,), {})('no')"),
        PluginError,
        "the pass tidy-up of odd 1.2 on model failed: Oops: no",
    ),
    "adapters": (
        PASS.replace("(GraphPass)", "(AdapterPass)").replace(
            "return 0",
            "\n        path, a = next(iter(model.adapters.items()))\n"
            "        first = dataclasses.replace(a.branches[0], scale=9.0)\n"
            "        a = dataclasses.replace(a, branches=(first, *a.branches[1:]))\n"
            "        return model.replace(adapters={**model.adapters, path: a})",
        ),
        ParityError,
        "the pass tidy-up of odd 1.2 is exact, but moved the output of",
    ),
    "no model": (
        PASS.replace("(GraphPass)", "(AdapterPass)"),
        PluginError,
        "the pass tidy-up of odd 1.2 failed: ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_pass_that_breaks_the_engine_is_named(
    case: str, package: Package, copy_native: Any, tmp_path: Path
) -> None:
    code, error, words = WRONG[case]
    package("eptc.passes", "tidy-up", code)
    with pytest.raises(error) as caught:
        _export(copy_native, tmp_path / "out", passes=["tidy-up"])
    assert re.search(words, str(caught.value).replace("\n", " ")), str(caught.value)
    assert _unpublished(tmp_path)


UNSOUND = {
    "lossy": (
        PASS.replace('"exact"', '"lossy"'),
        OptionError,
        "the pass tidy-up of odd 1.2 is lossy",
    ),
    "contract": (PASS.replace('"exact"', '"some"'), PluginError, "its contract is 'some'"),
    "a list": (
        PASS.replace("int = 1", "list = dataclasses.field(default_factory=list)"),
        PluginError,
        "its option times is a list, which can be changed",
    ),
    "no JSON": (PASS.replace("int = 1", "object = object()"), PluginError, "no JSON values"),
    "not a number": (PASS.replace("int = 1", "float = float('nan')"), PluginError, "no JSON"),
    "not frozen": (
        PASS + "class Sub(It): pass\nIt = Sub",
        PluginError,
        "its class is no frozen dataclass",
    ),
    "no rewrite": (PASS.replace("rewrite", "write"), PluginError, "it cannot be made: TypeError"),
    "no pass": (
        "class It: name = 'tidy-up'",
        PluginError,
        "no subclass of AdapterPass or GraphPass",
    ),
    "another name": (PASS.replace('"tidy-up"', '"x"'), PluginError, "it calls itself 'x'"),
    "needs an option": (PASS.replace("int = 1", "int"), OptionError, "not given its option times"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_pass_that_is_none(
    case: str, package: Package, copy_native: Any, tmp_path: Path
) -> None:
    code, error, words = UNSOUND[case]
    package("eptc.passes", "tidy-up", code)
    with pytest.raises(error, match=words):
        _export(copy_native, tmp_path / "out", passes=["tidy-up"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tidy-up:time=3", "no option 'time': did you mean 'times'"),
        ("tidy-up:times=x", "times is 'x'\nexpected: an integer"),
        ("tidy-up:times=true", "times is 'true'"),
        ("tidy-up:times=1.5", "expected: an integer"),
        ("tidy-up:times=1,times=2", "given times twice"),
        ("tidy-up:times", "expected: tidy-up:option=value"),
        ("tidy-up:", "expected: tidy-up:option=value"),
    ],
)
def test_options_of_a_pass(
    given: str, words: str, package: Package, copy_native: Any, tmp_path: Path, cli: Any
) -> None:
    package("eptc.passes", "tidy-up", PASS)
    done = cli("export", copy_native.ckpt, "--base", copy_native.base, "--task", "tone",
               "-o", tmp_path / "out", "--pass", given)  # fmt: skip
    assert done.code == 2
    assert words in done.stderr
    done = cli("export", copy_native.ckpt, "--base", copy_native.base, "--task", "tone",
               "--pass", "tidy-up", "--pass", "tidy-up:times=2", "--dry-run")  # fmt: skip
    assert (done.code, "the pass tidy-up is given twice" in done.stderr) == (2, True)


@dataclasses.dataclass(frozen=True)
class Mine(AdapterPass):
    """A pass that a program brings along, and that does nothing."""

    name: ClassVar[str] = "mine"
    contract: ClassVar[Contract] = "exact"
    sizes: tuple[int, ...] = (1, 2)

    def rewrite(self, model: AdaptedModel) -> AdaptedModel:
        return model


def test_passes_as_objects(copy_native: Any, tmp_path: Path) -> None:
    built = _export(copy_native, tmp_path / "out", passes=[Mine((3,))])
    names = [step["name"] for step in built.manifest.passes]
    assert names[:4] == ["specialize-router", "drop-dead-experts", "mine", "fold-pyramid"]
    recorded = json.loads((built.path / "manifest.json").read_text())["passes"][2]
    assert recorded["options"] == {"sizes": [3]}
    assert recorded["origin"] == f"{__name__}:Mine"
    assert recorded["error"] == 0.0

    @dataclasses.dataclass(frozen=True)
    class Loose(GraphPass):
        name: ClassVar[str] = "stable-names"
        contract: ClassVar[Contract] = "exact"

        def rewrite(self, model: onnx_ir.Model) -> int:
            return len(model.graph)

    for given, words in ((3, "3 was given as a pass"), (Loose(), "a pass of eptc's own")):
        with pytest.raises(OptionError, match=words):
            _export(copy_native, tmp_path / "out2", passes=[given])


def test_values_of_options() -> None:
    """Each is read by the type of its field."""

    @dataclasses.dataclass(frozen=True)
    class Kind:
        flag: bool
        number: float
        name: str
        maybe: int | None
        mode: ClassVar[int]
        names: tuple[str, ...]
        pair: tuple[int, str]
        anything: Any

    for field, text, value in (
        ("flag", "true", True),
        ("number", "3", 3.0),
        ("name", "3", "3"),
        ("name", '"a,b"', "a,b"),
        ("name", "a=b", "a=b"),
        ("maybe", "null", None),
        ("names", '["a", "b"]', ("a", "b")),
        ("pair", '[1, "b"]', (1, "b")),
        ("anything", "[1]", (1,)),
    ):
        found = option_value(Kind, field, text)
        assert (found, type(found)) == (value, type(value))
    for field, text in (("flag", "1"), ("number", "x"), ("maybe", "x"), ("names", "[1]"),
                        ("pair", "[1]"), ("names", "a")):  # fmt: skip
        with pytest.raises(OptionError, match=f"{field} is "):
            option_value(Kind, field, text)


# ---- targets

TARGET = """
from eptc.targets import Target
class It(Target):
    name = "phone"
    def add(self, directory, manifest, out): (out / "notes.txt").write_text(manifest.target)
"""
ANYWHERE = TARGET + '    optimize_for = "any"\n'
ADD = '(out / "notes.txt").write_text(manifest.target)'
MISDEEDS = {
    "raises": (ADD + "; 1 / 0", "it fails: ZeroDivisionError"),
    "disk full": ("raise OSError(28, 'No space left')", "No space left"),
    "damages": ("(directory / 'model.onnx').write_bytes(b'')", "it changed model.onnx"),
    "removes": ("(directory / 'weights.bin').unlink()", "it changed weights.bin"),
    "beside": ("(directory / 'more.txt').write_text('')", "it changed more.txt"),
    "manifest": (
        "(out / 'manifest.json').write_text('{}')",
        "'manifest.json', which is a name of",
    ),
    "verdict": ("(out / 'Parity.json').write_text('{}')", "'Parity.json', which is a name of"),
    "folder": ("(out / 'more').mkdir()", "'more', which is no plain file"),
    "link": ("(out / 'more').symlink_to('/etc/hosts')", "'more', which is no plain file"),
    "name": ("(out / 'a b').write_text('')", "is not a file name of a bundle"),
}


@pytest.mark.parametrize("case", MISDEEDS)
def test_a_target_that_goes_wrong(
    case: str, package: Package, copy_native: Any, tmp_path: Path
) -> None:
    """Nothing is published, and an older bundle stays as it was."""
    deed, words = MISDEEDS[case]
    called = package("eptc.targets", "phone", TARGET.replace(ADD, deed))
    out = tmp_path / "out"
    out.mkdir()
    (out / "older").write_text("")
    with pytest.raises(PluginError, match=words) as caught:
        _export(copy_native, out, target="phone", verify=False, force=True)
    assert called in str(caught.value)
    assert [path.name for path in out.iterdir()] == ["older"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_target(package: Package, copy_native: Any, tmp_path: Path, cli: Any) -> None:
    package("eptc.targets", "phone", ANYWHERE)
    built = _export(copy_native, tmp_path / "out", target="phone")
    assert (built.manifest.target, built.manifest.optimized_for) == ("phone", "any")
    assert (built.path / "notes.txt").read_text() == "onnx"
    assert "notes.txt" in json.loads((built.path / "manifest.json").read_text())["files"]
    assert eptc.verify(built.path).warnings == ()
    done = cli("export", copy_native.ckpt, "--base", copy_native.base, "--task", "tone", "-o",
               tmp_path / "out2", "--target", "phone", "--optimize-for", "cpu")  # fmt: skip
    assert done.code == 2
    assert "--optimize-for cpu was given together with --target phone" in done.stderr
    done = cli("export", copy_native.ckpt, "--base", copy_native.base, "--task", "tone", "-o",
               tmp_path / "out2", "--target", "phone", "--precision", "int4")  # fmt: skip
    assert done.code == 2
    assert "--precision int4 does not run where --optimize-for any" in done.stderr


def test_every_precision_for_a_target(
    package: Package, small_native: Any, small_rows: Any, tmp_path: Path
) -> None:
    """What does not run where the target is for is a row that says so; the others have it all."""
    pytest.importorskip("matplotlib")
    package(
        "eptc.targets", "phone", TARGET.replace('"phone"\n', '"phone"\n    optimize_for="any"\n')
    )
    package("eptc.passes", "tidy-up", PASS, dist="even")
    options = {"base": small_native.base, "task": "score", "data": small_rows.values}
    found = eptc.compare_precisions(
        small_native.ckpt, out=tmp_path / "out", precisions=["int4", "int8"], target="phone",
        passes=["tidy-up"], **options,
    )  # fmt: skip
    rows = {row.precision: row.refused for row in found.rows}
    assert "does not run where --optimize-for any" in str(rows.pop("int4"))
    assert rows == {"fp32": None, "int8": None}
    for precision in rows:
        manifest = json.loads((found.path / precision / "manifest.json").read_text())
        assert manifest["target"] == "phone"
        assert "notes.txt" in manifest["files"]
        assert manifest["tools"]["even"] == "1.2"
    with pytest.raises(OptionError, match="the target is 'watch'"):
        eptc.compare_precisions(small_native.ckpt, out=tmp_path / "o", target="watch", **options)
