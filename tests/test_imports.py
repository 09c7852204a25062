"""What is imported when: a service's process stays free of the compiler."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eptc

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors",
         "ml_dtypes", "jsonschema", "sentencepiece")  # fmt: skip
RUNTIME = ("onnxruntime", "tokenizers", "numpy")

# Ends with the names of everything that was imported, whatever the program printed before.
_REPORT = """
import sys
print()
print(*{name.partition(".")[0] for name in sys.modules})
"""
_COMMAND = """
import sys
sys.argv[0] = "eptc"
from eptc.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
# As if the extra were not installed; the first word says how much of it.
_WITHOUT = """
import sys
blocked = sys.argv.pop(1).split(",")
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker)
"""


def _run(program: str, *arguments: object, cwd: Path | None = None) -> Any:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def _imported(program: str, *arguments: object) -> set[str]:
    done = _run(program + _REPORT, *arguments)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("import eptc", ()),
        ("import eptc; dir(eptc); eptc.__version__", ()),
        (_COMMAND, ("--help",)),
        (_COMMAND, ("--version",)),
        (_COMMAND, ("export", "--help")),
        (_COMMAND, ("run", "--help")),
    ],
)
def test_a_look_at_the_package_imports_nothing_heavy(
    program: str, arguments: tuple[str, ...]
) -> None:
    assert _imported(program, *arguments).isdisjoint({*HEAVY, *RUNTIME})


@pytest.mark.parametrize("program", ["import eptc.runtime", "import eptc; eptc.Engine"])
def test_the_runtime_imports_no_compiler(program: str) -> None:
    imported = _imported(program)
    assert imported.isdisjoint(HEAVY)
    assert "numpy" in imported


@pytest.fixture(scope="module")
def bundle(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imports") / "bundle"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out, verify=False)
    return out


@pytest.mark.parametrize(
    "arguments", [("run", "{}", "the film was good"), ("verify", "{}"), ("inspect", "{}")]
)
def test_a_bundle_is_used_without_the_compiler(bundle: Path, arguments: tuple[str, ...]) -> None:
    filled = [argument.format(bundle) for argument in arguments]
    assert _imported(_COMMAND, *filled).isdisjoint(HEAVY)
    without = _run(_WITHOUT + _COMMAND, ",".join(HEAVY), *filled, "--json")
    assert (without.returncode, without.stderr) == (0, "")
    json.loads(without.stdout)


def test_doctor_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in HEAVY else find_spec(name)
    )
    (target,) = eptc.doctor()["targets"].values()
    assert target.startswith("needs jsonschema, ml_dtypes, onnx, ")
    assert target.endswith("pip install 'ept-compiler[compile]'")


@pytest.mark.parametrize("missing", ["torch", "transformers", "onnx_ir", "onnx", "jsonschema"])
def test_an_extra_that_is_not_installed(small_native: Any, tmp_path: Path, missing: str) -> None:
    """The message names the package and the extra; nothing is written."""
    options = ("--base", small_native.base, "--task", "tone", "-o", tmp_path / "out")
    done = _run(_WITHOUT + _COMMAND.replace("not end.code", "end.code == 2"), missing,
                "export", small_native.ckpt, *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"the package '{missing}' is not installed" in done.stderr
    assert "pip install 'ept-compiler[compile]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_inspected_without_torch(small_native: Any) -> None:
    blocked = "torch,transformers,onnx,onnx_ir,onnxscript"
    options = ("--base", small_native.base, "--json")
    done = _run(_WITHOUT + _COMMAND, blocked, "inspect", small_native.ckpt, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["what"] == "checkpoint"


def test_the_public_surface() -> None:
    assert eptc.__all__ == sorted(eptc.__all__)
    assert dir(eptc) == eptc.__all__
    for name in eptc.__all__:
        assert callable(getattr(eptc, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eptc.nothing


def test_every_module_has_what_it_offers() -> None:
    root = Path(eptc.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = importlib.import_module(".".join(("eptc", *parts)).removesuffix(".__init__"))
        missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
        assert missing == [], module.__name__
