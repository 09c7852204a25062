"""The pytest plugin: one test per check, red where something is wrong and only there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import eptc
from eptc.runtime.seal import sealed

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ci"
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "numpy", "tokenizers"}


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run of pytest ended.

    Args:
        code: its exit code.
        output: what it printed.
        tests: from JUnit's file, by name: passed, failed or skipped, and the message.
        properties: of each test.
    """

    code: int
    output: str
    tests: dict[str, tuple[str, str]]
    properties: dict[str, dict[str, str]]

    def named(self, outcome: str) -> set[str]:
        """Names of the tests that ended so, without what stands in brackets."""
        return {
            name.partition("[")[0] for name, found in self.tests.items() if found[0] == outcome
        }


def read(junit: Path, code: int, output: str) -> Run:
    tests, properties = {}, {}
    if junit.exists():
        for case in ElementTree.parse(junit).getroot().iter("testcase"):
            outcome, message = "passed", ""
            for kind, called in (("failure", "failed"), ("skipped", "skipped")):
                if (found := case.find(kind)) is not None:
                    outcome, message = called, f"{found.get('message')}\n{found.text}"
            tests[str(case.get("name"))] = outcome, message
            properties[str(case.get("name"))] = {
                str(p.get("name")): str(p.get("value")) for p in case.iter("property")
            }
    return Run(code, output, tests, properties)


@pytest.fixture(scope="module")
def bundle(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plugin") / "tone"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out)
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "tone"))


@pytest.fixture
def check(
    small_native: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Run]:
    """Return a function that runs the plugin in this process, in a folder with one test."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "test_own.py").write_text("def test_own() -> None: ...\n")

    def run(bundle: Path, *arguments: object, ini: str = "", **options: object) -> Run:
        (project / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        given = {"reference": small_native.ckpt, "base": small_native.base, **options}
        code = pytest.main(
            [
                # By its module, whether or not what is installed names it already.
                "-p", "no:eptc", "-p", "eptc.pytest_plugin", "-p", "no:cacheprovider",
                "-p", "no:timeout", "-p", "no:faulthandler", "-p", "no:xdist",
                "--import-mode=importlib",
                f"--rootdir={project}", f"--junitxml={project / 'junit.xml'}", str(project),
                f"--eptc-bundle={bundle}",
                *(f"--eptc-{name}={value}" for name, value in given.items() if value is not None),
                *map(str, arguments),
            ]
        )  # fmt: skip
        captured = capsys.readouterr()
        return read(project / "junit.xml", int(code), captured.out + captured.err)

    return run


def test_a_good_bundle(check: Callable[..., Run], bundle: Path) -> None:
    run = check(bundle)
    assert run.code == 0, run.output
    assert run.named("failed") == set()
    assert run.named("passed") == {
        "manifest", "files", "graphs", "origin", "interface", "weights", "tokenizer", "tensors",
        "decisions", "test_own",
    }  # fmt: skip
    skipped = {name: why for name, (how, why) in run.tests.items() if how == "skipped"}
    assert {name: why.split("\n")[0] for name, why in skipped.items()} == {
        "coverage": "no route depends on the input: every row is compared",
        "blocks": "the model is compared as a whole: see weights and tensors",
        "scores": "no labelled data was given",
    }  # fmt: skip
    # The same probes as `eptc parity` has, by names that a shell and JUnit take as they are.
    built = json.loads((bundle / "parity.json").read_text())
    probes = [name.removeprefix("tensors") for name in run.tests if name.startswith("tensors[")]
    assert probes == [f"[{probe['name'].replace(' ', '-')}]" for probe in built["probes"]]
    found = run.properties["tensors[texts-0-to-7]"]
    (entry,) = [t for t in built["tensors"] if t["what"] == "logits, texts 0 to 7"]
    assert {name: float(value) for name, value in found.items()} == {
        "eptc_error": entry["error"], "eptc_bound": entry["bound"],
    }  # fmt: skip


def test_a_damaged_weight(check: Callable[..., Run], copy: Path) -> None:
    data = bytearray((copy / "weights.bin").read_bytes())
    data[len(data) // 2 // 4 * 4 + 2] ^= 0x40
    (copy / "weights.bin").write_bytes(bytes(data))
    run = check(copy)
    assert run.code == 1
    assert run.named("failed") == {"files", "weights", "tensors"}
    assert {name for name, (how, _) in run.tests.items() if how == "failed"} >= {
        "files[weights.bin]", "weights", "tensors[texts-0-to-7]",
    }  # fmt: skip
    assert run.tests["graphs[model]"][0] == "skipped"  # what is damaged is not loaded
    message = run.tests["weights"][1]
    assert "the weight bert.encoder.layer.0" in message
    assert "to fix:" in message
    assert "Traceback" not in run.output
    assert ".py:" not in message


def test_labels_in_another_order(check: Callable[..., Run], copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["task"]["labels"].reverse()
    path.write_text(json.dumps(sealed(manifest)))
    run = check(copy)
    assert run.code == 1
    assert run.named("failed") == {"interface"}
    assert "labels=('good', 'bad')" in run.tests["interface"][1]
    assert "labels=('bad', 'good')" in run.tests["interface"][1]


def test_another_checkpoint(check: Callable[..., Run], bundle: Path, small_routed: Any) -> None:
    run = check(bundle, reference=small_routed.ckpt, base=small_routed.base)
    assert run.code == 1
    assert run.named("failed") == {"origin"}
    assert "was made from another checkpoint" in run.tests["origin"][1]
    assert run.tests["weights"] == ("skipped", run.tests["weights"][1])
    assert "see origin" in run.tests["weights"][1]


def test_a_manifest_nobody_can_read(check: Callable[..., Run], copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    run = check(copy)
    assert run.code == 1
    assert run.named("failed") == {"manifest"}
    assert set(run.tests) == {"manifest", "test_own"}


def test_an_engine_that_does_not_load(check: Callable[..., Run], copy: Path) -> None:
    """The file is what the manifest says, and no graph."""
    import hashlib

    (copy / "model.onnx").write_bytes(b"no graph")
    manifest = json.loads((copy / "manifest.json").read_text())
    digest = hashlib.sha256(b"no graph").hexdigest()
    manifest["files"]["model.onnx"] = {"size": 8, "sha256": digest}
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    run = check(copy)
    assert run.code == 1
    assert run.named("failed") == {"graphs", "interface", "weights", "tokenizer", "tensors"}
    assert run.tests["decisions[texts-0-to-7]"][0] == "skipped"


def test_bounds_from_the_configuration(check: Callable[..., Run], bundle: Path) -> None:
    run = check(bundle, ini="eptc_tolerance = 1e-9")
    assert run.named("failed") == {"tensors"}
    assert "at most 1e-09 of the largest element (as configured)" in run.output
    run = check(bundle, ini="eptc_min_cosine = 1.5")
    assert run.named("failed") == {"tensors"}
    assert ", at least 1.5)" in run.output


@pytest.fixture(scope="module")
def lossy(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plugin") / "score"
    eptc.export(small_native.ckpt, base=small_native.base, task="score", out=out, precision="int4")
    return out


def test_scores(check: Callable[..., Run], lossy: Path, small_rows: Any) -> None:
    """What is lost is bounded by the budget: any, then none at all."""
    run = check(lossy, "-k", "scores", data=small_rows.values, ini="eptc_max_drop = 100")
    assert run.code == 0, run.output
    assert set(run.tests) == {"scores"}
    assert float(run.properties["scores"]["eptc_drop"]) > 0
    run = check(lossy, "-k", "scores", data=small_rows.values, ini="eptc_max_drop = 0")
    assert run.code == 1
    assert "drops by" in run.tests["scores"][1]
    assert "build with a precision that loses less" in run.tests["scores"][1]


def test_block_by_block(
    check: Callable[..., Run], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tests whatever the memory: what does not fit is another one's."""
    whole = check(bundle)
    monkeypatch.setattr("eptc.pair.available_memory", lambda: 2**10)
    run = check(bundle)
    assert run.code == 0, run.output
    assert list(run.tests) == list(whole.tests)
    assert run.tests["blocks"][0] == "passed"
    assert run.named("skipped") == {
        "interface", "weights", "tokenizer", "tensors", "decisions", "coverage", "scores",
    }  # fmt: skip


def test_routes_that_depend_on_the_input(
    check: Callable[..., Run], small_routed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "routed"
    eptc.export(small_routed.ckpt, base=small_routed.base, task="tone", out=out)
    run = check(out, reference=small_routed.ckpt, base=small_routed.base)
    assert run.code == 0, run.output
    assert {"tensors", "decisions", "coverage"} <= run.named("passed")
    assert int(run.properties["coverage"]["eptc_rows"]) > 0


@pytest.mark.parametrize(
    ("options", "ini", "message"),
    [
        ({"reference": None}, "", "--eptc-bundle needs --eptc-reference"),
        ({"base": "nowhere"}, "", "--eptc-base is nowhere, which does not exist"),
        ({}, "eptc_max_flips = many", "eptc_max_flips is 'many'; expected a number"),
        ({}, "eptc_tolerance = inf", "eptc_tolerance is 'inf'; expected a number of 0 or more"),
        ({}, "eptc_tolerance = nan", "eptc_tolerance is 'nan'; expected a number of 0 or more"),
        ({}, "eptc_tolerance = -1e-3", "expected a number of 0 or more"),
        ({}, "eptc_min_cosine = 1e999%", "eptc_min_cosine is '1e999%'; expected a number of 0"),
        ({}, "eptc_max_drop = -1", "eptc_max_drop is '-1'; expected a number from 0 to 100"),
        ({}, "eptc_max_drop = 101", "eptc_max_drop is '101'; expected a number from 0 to 100"),
        ({}, "eptc_max_flips = 5", "eptc_max_flips is '5'; expected a number from 0 to 1"),
    ],
)
def test_bad_usage(
    check: Callable[..., Run], bundle: Path, options: Any, ini: str, message: str
) -> None:
    run = check(bundle, ini=ini, **options)
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert message in run.output


def test_several_tasks(check: Callable[..., Run], small_native: Any, tmp_path: Path) -> None:
    """A test for each task's batches, and for those whose rows are of several."""
    out, data = tmp_path / "several", tmp_path / "data.jsonl"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone,score", out=out)
    data.write_text(
        '{"task": "tone", "text": "a good film", "label": "good"}\n'
        '{"task": "tone", "text": "very dull", "label": "bad"}\n'
    )
    run = check(out, data=data)
    assert run.code == 0, run.output
    assert {"interface[tone]", "interface[score]", "tokenizer[score]", "task ids"} <= set(
        run.tests
    )
    assert run.tests["scores[tone]"][0] == "passed"
    assert "no labelled data was given" in run.tests["scores[score]"][1]
    built = json.loads((out / "parity.json").read_text())
    for part, found in (*built["tasks"].items(), ("tasks-side-by-side", built["mixed"])):
        for entry in found["probes"]:
            if part != "tone" or entry["synthetic"]:  # the data are tone's texts
                plain = re.sub(r"[^\w.]+", "-", entry["name"]).strip("-")
                assert run.tests[f"tensors[{part}-{plain}]"][0] == "passed"


def test_a_pack(check: Callable[..., Run], small_native: Any, tmp_path: Path) -> None:
    """A test for each task's batches, as it is switched to and folded."""
    out = tmp_path / "pack"
    eptc.export(
        small_native.ckpt, base=small_native.base, task="tone,score", layout="pack", out=out,
        verify=False,
    )  # fmt: skip
    run = check(out)
    assert run.code == 0, run.output
    assert run.named("failed") == set()
    for name in ("tone", "score"):
        for what in ("origin", "interface", "weights", "tokenizer"):
            assert run.tests[f"{what}[{name}]"][0] == "passed"
        for part in (name, f"{name}-folded"):
            assert run.tests[f"tensors[{part}-texts-0-to-7]"][0] == "passed"
    assert run.tests["files[score.onnx_adapter]"][0] == "passed"
    with (out / "score.onnx_adapter").open("ab") as file:
        file.write(b"x")
    run = check(out)
    assert run.code == 1
    assert run.tests["weights[score]"][0] == "failed"
    assert run.tests["files[score.onnx_adapter]"][0] == "failed"
    assert run.tests["tensors[tone-folded-texts-0-to-7]"][0] == "passed"
    assert "Traceback" not in run.output


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return a function that runs pytest where eptc is installed: it finds the plugin itself."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(project: Path, *arguments: object) -> Run:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=junit.xml",
             *map(str, arguments)],
            cwd=project, env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return read(project / "junit.xml", done.returncode, done.stdout + done.stderr)

    return run


def test_a_plain_run_loads_nothing(installed: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\n"
        "def test_own():\n"
        f"    assert not set(sys.modules) & {HEAVY!r}\n"
        "    assert 'eptc.pytest_plugin' in sys.modules\n"
        "    assert not [m for m in sys.modules if m.startswith('eptc.') and 'plugin' not in m]\n"
    )
    run = installed(tmp_path)
    assert run.code == 0, run.output
    assert set(run.tests) == {"test_own"}


def test_the_example(
    installed: Callable[..., Run], bundle: Path, small_native: Any, tmp_path: Path
) -> None:
    """The project as it stands, with the command of its README, on two workers.

    Warnings of the project's own are errors; those of what the checks load are not its own.
    """
    project = Path(shutil.copytree(EXAMPLE, tmp_path / "project"))
    for name, source in (
        ("bundle", bundle), ("checkpoint", small_native.ckpt), ("base", small_native.base),
    ):  # fmt: skip
        shutil.copytree(source, project / name)
    (project / "held-out.jsonl").write_text(
        '{"text": "a good film", "label": "good"}\n{"text": "very dull", "label": "bad"}\n'
    )
    (command,) = [
        line for line in (project / "README.md").read_text().split("\n")
        if line.startswith("pytest ")
    ]  # fmt: skip
    workflow = (project / ".github" / "workflows" / "parity.yml").read_text()
    given = command.replace("--junitxml parity.xml", "").split()[1:]
    assert all(word in workflow.split() for word in given)
    run = installed(project, *given, "-n", "2", "--dist", "load", "-W", "error")
    assert run.code == 0, run.output
    assert run.tests["scores"][0] == "passed"
    assert run.tests["test_every_text_gets_a_label"][0] == "passed"
    assert run.named("failed") == set()
