"""`--target tensorrt`: proven bundles that TensorRT can be given, and what lies beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir
import pytest

import eptc
from eptc.errors import BundleError, OptionError
from eptc.job import read_source
from eptc.lower.edit import drop, insert, replace
from eptc.options import Options
from eptc.parity_gate import LocalVerifier, Subject
from eptc.pass_base import Contract, GraphPass
from eptc.runtime import Engine
from eptc.tensorrt.build import prove_engine
from eptc.tensorrt.build_engine import PROFILES
from eptc.tensorrt.engine import load
from eptc.tensorrt.operators import listed, parse_version
from eptc.tensorrt.profiles import Range
from eptc.tensorrt.scripts import SCRIPT, TRTEXEC
from eptc.tensorrt.target import TensorRT, missing

TEXTS = ["the film was good", "bad", "not a very long film and not a dull film"]
TOO_LONG = "film " * 500
FILES = {PROFILES, SCRIPT, TRTEXEC}
CONTROL = {"If", "Loop", "Scan"}
GOLDEN = ("t5-tiny", "t5-gated-tiny", "llama-tiny")


@pytest.fixture(scope="module")
def classifier(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> eptc.Bundle:
    """The small native checkpoint's, by the usual gate."""
    return eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", target="tensorrt",
        out=tmp_path_factory.mktemp("tensorrt") / "out",
    )  # fmt: skip


@pytest.fixture(scope="module", params=GOLDEN)
def generator(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> eptc.Bundle:
    """Those of recorded checkpoints, by the usual gate."""
    folder = golden / "ept" / request.param
    meta = json.loads((folder / "meta.json").read_text())
    return eptc.export(
        folder / "adapter", base=folder / "base", task=0, tasks=meta["tasks"],
        top_k=meta["moe_top_k"], target="tensorrt", tensorrt_version="11.2",
        out=tmp_path_factory.mktemp("tensorrt") / "out",
    )  # fmt: skip


def shapes(bundle: eptc.Bundle) -> Any:
    return json.loads((bundle.path / PROFILES).read_text())


def commands(bundle: eptc.Bundle) -> list[list[str]]:
    """Return the words of each command of the script."""
    text = (bundle.path / TRTEXEC).read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("trtexec")]
    assert len(lines) == len(bundle.manifest.graphs)
    return lines


def check_graphs(bundle: eptc.Bundle) -> None:
    """Check that every graph is of standard operators without control flow."""
    known = listed(parse_version(None)).types
    for spec in bundle.manifest.graphs.values():
        model = onnx.load(bundle.path / spec.file, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        found = {node.op_type for node in model.graph.node}
        assert found <= set(known) - CONTROL


def check_shapes(bundle: eptc.Bundle) -> None:
    """Check that each input with a named size has a range, and trtexec is told the same."""
    profile = shapes(bundle)
    assert set(profile["graphs"]) == set(bundle.manifest.graphs)
    for words, (role, spec) in zip(commands(bundle), bundle.manifest.graphs.items(), strict=True):
        inputs = profile["graphs"][role]["inputs"]
        dynamic = [t.name for t in spec.inputs if any(isinstance(size, str) for size in t.shape)]
        assert list(inputs) == dynamic
        given = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
        assert given["onnx"] == spec.file
        for bound in ("min", "opt", "max"):
            said = {
                name: [int(size) for size in sizes.split("x")]
                for name, _, sizes in (
                    part.rpartition(":") for part in given[f"{bound}Shapes"].split(",")
                )
            }
            assert said == {name: inputs[name][bound] for name in dynamic}
        assert given["saveEngine"] == f"{role}.engine"
        assert given["timingCacheFile"] == "timing.cache"


def test_a_classifier(classifier: eptc.Bundle) -> None:
    """A bundle as any other, proven on the very files, with plain files beside it."""
    manifest = classifier.manifest
    assert (manifest.target, manifest.optimized_for) == ("tensorrt", "any")
    assert manifest.parity["verified"]
    assert set(manifest.files) >= FILES
    assert not [path for path in classifier.path.iterdir() if not path.is_file()]
    assert eptc.verify(classifier.path).warnings == ()
    assert eptc.inspect(classifier.path)["target"] == "tensorrt"
    check_graphs(classifier)
    check_shapes(classifier)
    profile = shapes(classifier)
    assert profile["tensorrt"] == "10.15"
    assert profile["dimensions"]["batch"] == {"min": 1, "opt": 8, "max": 32, "from": "default"}


def test_the_same_answers(classifier: eptc.Bundle, small_native: Any, tmp_path: Path) -> None:
    """Parity again, and the answers of the engine for ONNX Runtime."""
    assert eptc.parity(classifier.path, reference=small_native.ckpt, base=small_native.base).passed
    plain = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", out=tmp_path / "o", verify=False
    )
    answers = []
    for bundle in (classifier, plain):
        with bundle.load(providers=["cpu"]) as engine:
            answers.append(np.array([a.probabilities for a in engine.classify(TEXTS)]))
    np.testing.assert_allclose(answers[0], answers[1], rtol=0, atol=1e-5)


def test_decoders(generator: eptc.Bundle) -> None:
    """One decoder for first and later steps, without control flow; nothing said of 11's types."""
    manifest = generator.manifest
    assert manifest.parity["verified"]
    check_graphs(generator)
    check_shapes(generator)
    for words in commands(generator):
        assert "--stronglyTyped" not in words
    sizes = shapes(generator)["dimensions"]
    assert sizes["past_sequence"]["min"] == 0
    assert shapes(generator)["operators"] == "10.15"
    assert [
        p["name"] for p in manifest.passes if p["name"] == "clip-integers" and p["changed"]
    ] == (["clip-integers"] if manifest.kind == "encoder-decoder" else [])


def test_equal_builds(classifier: eptc.Bundle, small_native: Any, tmp_path: Path) -> None:
    """Two builds are equal to the byte, and no path is in any file."""
    again = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", target="tensorrt",
        out=tmp_path / "again",
    )  # fmt: skip
    for name in (*classifier.manifest.files, "manifest.json"):
        content = (classifier.path / name).read_bytes()
        assert content == (again.path / name).read_bytes()
        for place in (classifier.path, small_native.ckpt, small_native.base, Path.home()):
            assert str(place).encode() not in content


@pytest.mark.parametrize("precision", ["fp16", "bf16", "keep"])
def test_precisions(precision: Any, small_native: Any, tmp_path: Path) -> None:
    built = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", target="tensorrt",
        precision=precision, out=tmp_path / "out",
    )  # fmt: skip
    assert built.manifest.parity["verified"]
    check_graphs(built)


@pytest.mark.parametrize(
    ("precision", "element"),
    [
        ("int8-static", "INT8"),
        ("fp8", "FLOAT8E4M3FN"),
        ("int8-fp16", "INT8"),
        ("fp8-fp16", "FLOAT8E4M3FN"),
    ],
)
@pytest.mark.parametrize("task", ["tone", "score"])
def test_explicit_quantization(
    task: str, precision: Any, element: str, small_native: Any, small_rows: Any, tmp_path: Path
) -> None:
    """Every adapted linear reads 8-bit numbers, by standard nodes of the operator list."""
    built = eptc.export(
        small_native.ckpt, base=small_native.base, task=task, target="tensorrt",
        precision=precision, calibration=small_rows.texts, out=tmp_path / "out",
    )  # fmt: skip
    assert built.manifest.parity["verified"]
    check_graphs(built)
    graph = onnx.load(built.path / "model.onnx", load_external_data=False).graph
    stored = [
        t for t in graph.initializer if t.data_type == onnx.TensorProto.DataType.Value(element)
    ]
    assert len([t for t in stored if len(t.dims) == 2]) >= 6
    kinds = {node.op_type for node in graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    scales = {t.name: t.data_type for t in graph.initializer if t.name.endswith("@scale")}
    half = precision.endswith("fp16")
    assert set(scales.values()) == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}


def test_prompts_take_positions(small_mept: Any, tmp_path: Path) -> None:
    """Of 64 positions three are those of the prompts."""
    prompted = small_mept("llama")
    options: dict[str, Any] = {"base": prompted.base, "target": "tensorrt", "verify": False}
    with pytest.raises(OptionError, match="the model takes 61 at most"):
        eptc.export(prompted.ckpt, out=tmp_path / "o", profile=["sequence=1:8:62"], **options)
    built = eptc.export(
        prompted.ckpt, out=tmp_path / "out", profile=["sequence=1:8:61"], **options
    )
    check_graphs(built)
    check_shapes(built)


def test_several_tasks(small_native: Any, tmp_path: Path) -> None:
    """Rows name their task; a place that is none is refused by who runs the engine."""
    built = eptc.export(
        small_native.ckpt, base=small_native.base, task="all", target="tensorrt",
        out=tmp_path / "out",
    )  # fmt: skip
    assert built.manifest.parity["verified"]
    check_graphs(built)
    check_shapes(built)
    assert shapes(built)["graphs"]["model"]["inputs"]["task_ids"]["max"] == [32]
    assert any("TensorRT" in note and "task_ids" in note for note in built.warnings)


def test_text_tells_the_shapes(small_native: Any, tmp_path: Path) -> None:
    """Lengths of --probe, cut as an engine cuts them, and what --profile says before them."""
    probe, texts = tmp_path / "probe.jsonl", [*TEXTS, TOO_LONG]
    probe.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    built = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", target="tensorrt", probe=probe,
        profile=["batch=2:4:6"], out=tmp_path / "out", verify=True,
    )  # fmt: skip
    sizes = shapes(built)["dimensions"]
    with built.load(providers=["cpu"]) as engine:
        mask = engine.tokenize(texts, truncate=True)["attention_mask"]
    lengths = sorted(int(row.sum()) for row in mask)
    assert sizes["batch"] == {"min": 2, "opt": 4, "max": 6, "from": "given"}
    assert sizes["sequence"] == {"min": 1, "opt": lengths[2], "max": lengths[3], "from": "probe"}


def test_every_precision(small_native: Any, small_rows: Any, tmp_path: Path) -> None:
    """What TensorRT does not take is a row that says so; the others have the same shapes."""
    pytest.importorskip("matplotlib")
    found = eptc.compare_precisions(
        small_native.ckpt, base=small_native.base, task="score", data=small_rows.values,
        out=tmp_path / "out", precisions=["fp16", "int4", "int8"], target="tensorrt",
        profile=["batch=1:2:4"],
    )  # fmt: skip
    rows = {row.precision: row.refused for row in found.rows}
    for precision in ("int4", "int8"):
        assert "which reads QuantizeLinear and DequantizeLinear" in str(rows.pop(precision))
    assert rows == {"fp32": None, "fp16": None}
    for precision in rows:
        profile = json.loads((found.path / precision / PROFILES).read_text())
        assert profile["dimensions"]["batch"]["max"] == 4
    with pytest.raises(OptionError, match="--profile is 'batch'"):
        eptc.compare_precisions(
            small_native.ckpt, base=small_native.base, task="score", data=small_rows.values,
            out=tmp_path / "o", target="tensorrt", profile=["batch"],
        )  # fmt: skip


REFUSALS: dict[str, tuple[list[str], str]] = {
    "provider": (["--optimize-for", "cuda"], "--optimize-for cuda was given together with"),
    "layout": (["--layout", "optimum"], "--layout optimum was given together with"),
    "pack": (["--layout", "pack"], "--layout pack was given together with --target tensorrt"),
    "dimension": (["--profile", "sequense=1:2:3"], "did you mean 'sequence'?"),
    "sizes": (["--profile", "sequence=1:64:99999"], "and the model takes"),
    "form": (["--profile", "batch=8"], "--profile is 'batch=8'"),
    "version": (["--tensorrt-version", "8.5"], "--tensorrt-version is 8.5"),
    "integers": (["--precision", "int8"], "of 8-bit integers, int8-static with --calibration"),
    "blocks": (["--precision", "int4"], "--precision int4 was given together with"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, small_native: Any, tmp_path: Path, cli: Any) -> None:
    """Exit code 2, a reason, and nothing published."""
    given, words = REFUSALS[case]
    done = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "tone", "--target",
        "tensorrt", "-o", tmp_path / "out", "--no-verify", *given,
    )  # fmt: skip
    assert done.code == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [["--profile", "batch=1:2:3"], ["--tensorrt-version", "10.3"], ["--build"]]
)
@pytest.mark.parametrize(
    ("target", "said"),
    [("onnx", "--target onnx"), ("lora", "--target lora"), ("triton", "--target triton")],
)
def test_options_of_this_target(
    given: list[str], target: str, said: str, small_native: Any, tmp_path: Path, cli: Any
) -> None:
    done = cli(
        "export", small_native.ckpt, "--base", small_native.base, "--task", "tone", "--target",
        target, "-o", tmp_path / "out", *given,
    )  # fmt: skip
    assert done.code == 2
    assert given[0] in done.stderr
    assert f"was given together with {said}" in done.stderr


@dataclasses.dataclass(frozen=True)
class OwnGelu(GraphPass):
    """ONNX Runtime's own Gelu in the place of the standard one: the same numbers."""

    name: ClassVar[str] = "own-gelu"
    contract: ClassVar[Contract] = "exact"

    def rewrite(self, model: onnx_ir.Model) -> int:
        found = [node for node in model.graph if node.op_type == "Gelu"]
        model.opset_imports["com.microsoft"] = 1
        for node in found:
            gelu = insert(node, "Gelu", list(node.inputs), domain="com.microsoft")
            replace(node.outputs[0], gelu.outputs[0])
            drop(node.outputs[0])
        return len(found)


def test_a_pass_of_another_package(small_native: Any, tmp_path: Path) -> None:
    """It is named with the node and its operator; for ONNX Runtime it is taken."""
    options: dict[str, Any] = {
        "base": small_native.base, "task": "tone", "passes": [OwnGelu()], "verify": False,
    }  # fmt: skip
    eptc.export(small_native.ckpt, out=tmp_path / "onnx", **options)
    with pytest.raises(OptionError) as caught:
        eptc.export(small_native.ckpt, out=tmp_path / "out", target="tensorrt", **options)
    assert "which the pass own-gelu of " in caught.value.found
    assert "is com.microsoft::Gelu: no standard operator" in caught.value.found
    assert "node 'bert.encoder.layer.0." in caught.value.found
    assert not (tmp_path / "out").exists()


# ---- what lies beside it


def test_the_commands(classifier: eptc.Bundle, generator: eptc.Bundle) -> None:
    """A shell takes them as they are meant; 10 is told of strong types, and nothing of others."""
    for bundle in (classifier, generator):
        script = bundle.path / TRTEXEC
        subprocess.run(["bash", "-n", script], check=True)
        for words in commands(bundle):
            assert not {"--fp16", "--bf16", "--int8", "--fp8", "--best"} & set(words)
            assert not [word for word in words if "=/" in word]
    assert all("--stronglyTyped" in words for words in commands(classifier))
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, classifier.path / TRTEXEC], check=True)


def test_the_commands_run(classifier: eptc.Bundle, tmp_path: Path) -> None:
    """From any folder: a program of trtexec's name is given what it would be, in the bundle's."""
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\npwd >"$SEEN"\nfor word; do echo "$word"; done >>"$SEEN"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
    }  # fmt: skip
    subprocess.run(["sh", classifier.path / TRTEXEC], check=True, cwd=tmp_path, env=environment)
    place, *words = (tmp_path / "seen").read_text().splitlines()
    assert Path(place) == classifier.path.resolve()
    # Some shells look into CDPATH first.
    (tmp_path / "elsewhere" / classifier.path.name).mkdir(parents=True)
    subprocess.run(
        ["sh", f"{classifier.path.name}/{TRTEXEC}"], check=True, cwd=classifier.path.parent,
        env={**environment, "CDPATH": str(tmp_path / "elsewhere")},
    )  # fmt: skip
    assert Path((tmp_path / "seen").read_text().splitlines()[0]) == classifier.path.resolve()
    assert ["trtexec", *words] == commands(classifier)[0]


@pytest.mark.skipif(missing() is None, reason="TensorRT and a GPU are there: it would build")
def test_the_script_without_a_gpu(classifier: eptc.Bundle, tmp_path: Path) -> None:
    """It says what is missing, and needs nothing of eptc's packages."""
    folder = tmp_path / "bundle"
    shutil.copytree(classifier.path, folder)
    ran = subprocess.run(
        [sys.executable, "-I", folder / SCRIPT], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("build_engine.py: error: ")
    assert {path.name for path in folder.iterdir()} == {p.name for p in classifier.path.iterdir()}
    unknown = subprocess.run(
        [sys.executable, "-I", folder / SCRIPT, "--graph", "decoder"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "there is no graph 'decoder', but model" in unknown.stderr


def test_no_engines(classifier: eptc.Bundle) -> None:
    """Before they are built there is nothing to load."""
    with pytest.raises(BundleError, match=r"has no engines\.json"):
        load(classifier.path)


@pytest.mark.skipif(missing() is None, reason="TensorRT and a GPU are there")
def test_build_without_a_gpu(tmp_path: Path, cli: Any) -> None:
    """Exit code 2 before anything is read: not even the checkpoint has to be there."""
    done = cli(
        "export", tmp_path / "nowhere", "--target", "tensorrt", "--build", "-o", tmp_path / "out"
    )
    assert done.code == 2
    assert "--build was given, and engines cannot be built here: " in done.stderr
    assert "run build_engine.py of the bundle" in done.stderr


def test_an_engine_is_published_with_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eptc.tensorrt.target.missing", lambda: None)
    options = Options(target="tensorrt", build=True)
    assert TensorRT().told(options).build
    with pytest.raises(OptionError, match="together with --no-verify"):
        TensorRT().told(dataclasses.replace(options, verify=False))


# ---- the proof of an engine, with ONNX Runtime in the place of TensorRT


@pytest.mark.parametrize("task", ["tone", "all"])
def test_the_proof(task: str, small_native: Any, tmp_path: Path) -> None:
    """It passes on a sound engine, leaves out what was not built for, and fails on another."""
    built = eptc.export(
        small_native.ckpt, base=small_native.base, task=task, target="tensorrt",
        out=tmp_path / "out", verify=False,
    )  # fmt: skip
    source = read_source(small_native.ckpt, Options(base=small_native.base))
    subject = Subject(source, task, None, by_block=False)
    wide = {"batch": Range(1, 8, 32), "sequence": Range(1, 64, 200)}
    narrow = {**wide, "batch": Range(1, 1, 2)}
    with contextlib.closing(LocalVerifier(subject)) as verifier:
        with built.load(providers=["cpu"]) as engine:
            report, left_out = prove_engine(engine, verifier, subject, wide, lambda _: None)
            assert report.passed
            assert left_out == 0
            fewer, left_out = prove_engine(engine, verifier, subject, narrow, lambda _: None)
            assert fewer.passed
            assert left_out > 0
            # Seeded tokens alone, or rows of one task, prove nothing.
            for rows in (3, 32, *([1] if task == "all" else [])):
                few = {**wide, "batch": Range(rows, rows, rows)}
                with pytest.raises(OptionError, match="no batch fits that would prove it"):
                    prove_engine(engine, verifier, subject, few, lambda _: None)
        damaged = tmp_path / "damaged"
        shutil.copytree(built.path, damaged)
        weights = bytearray((damaged / "weights.bin").read_bytes())
        half = len(weights) // 2 // 4 * 4
        values = np.frombuffer(bytes(weights[half:]), np.float32) * np.float32(1.5)
        weights[half:] = values.tobytes()
        (damaged / "weights.bin").write_bytes(bytes(weights))
        with Engine.load(damaged, providers=["cpu"]) as engine:
            report, _ = prove_engine(engine, verifier, subject, wide, lambda _: None)
            assert not report.agrees


# ---- where TensorRT and a GPU are: never run yet


@pytest.mark.gpu
@pytest.mark.skipif(missing() is not None, reason=f"needs TensorRT and a GPU: {missing()}")
def test_engines(small_native: Any, tmp_path: Path) -> None:
    """Built, proven, published with their record, loaded, and refused with another one."""
    built = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", target="tensorrt", build=True,
        out=tmp_path / "out",
    )  # fmt: skip
    assert built.manifest.parity["tensorrt"]["verified"]
    assert {"model.engine", "engines.json"} <= set(built.manifest.files)
    with load(built.path) as engine, built.load(providers=["cpu"]) as other:
        ours, theirs = (
            np.array([a.probabilities for a in e.classify(TEXTS)]) for e in (engine, other)
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    record = json.loads((built.path / "engines.json").read_text())
    (built.path / "engines.json").write_text(json.dumps({**record, "tensorrt": "10.0.0.1"}))
    with pytest.raises(BundleError, match="built by TensorRT"):
        load(built.path)


@pytest.mark.gpu
@pytest.mark.skipif(missing() is not None, reason=f"needs TensorRT and a GPU: {missing()}")
@pytest.mark.parametrize("name", GOLDEN)
def test_engines_that_write(name: str, golden: Path, tmp_path: Path) -> None:
    """A past of length 0 and longer ones, through the same engine; the greedy tokens of ORT."""
    folder = golden / "ept" / name
    meta = json.loads((folder / "meta.json").read_text())
    built = eptc.export(
        folder / "adapter", base=folder / "base", task=0, tasks=meta["tasks"],
        top_k=meta["moe_top_k"], target="tensorrt", build=True, out=tmp_path / "out",
    )  # fmt: skip
    want = np.load(folder / "golden" / "task0.npz")
    feeds = {key: want[key] for key in ("input_ids", "attention_mask")}
    with load(built.path) as engine, built.load(providers=["cpu"]) as other:
        assert engine.generate_ids(feeds) == other.generate_ids(feeds)
