"""The packages in examples/extending: installed by pip, found by their entry points, used."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from eptc.runtime import load_manifest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "extending"
LINEARS = {
    "encoder.block.0.layer.0.SelfAttention.q": (32, 24),
    "decoder.block.1.layer.2.DenseReluDense.wo": (24, 40),
}
SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Made:
    """A checkpoint in the example's format, its base, and what PyTorch makes of them."""

    ckpt: Path
    base: Path
    model: Any


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three packages, installed into a folder of their own, without a network."""
    if any(importlib.util.find_spec(name) is None for name in ("setuptools", "pip")):
        pytest.skip("needs setuptools and pip in this environment")
    root = tmp_path_factory.mktemp("extending")
    shutil.copytree(EXAMPLES, root / "sources", ignore=shutil.ignore_patterns("__pycache__"))
    sources = sorted(path.parent for path in (root / "sources").glob("*/pyproject.toml"))
    assert len(sources) == 3
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--target", root / "site", *sources],
        check=True, capture_output=True,
    )  # fmt: skip
    return root / "site"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Low ranks on a T5 of two narrow layers, and the same model with them merged by hand."""
    root = tmp_path_factory.mktemp("npz")
    shape = transformers.T5Config(
        vocab_size=60, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = transformers.T5ForConditionalGeneration(shape).eval()
    transformers.logging.disable_progress_bar()
    model.save_pretrained(root / "base")
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, (out, columns) in LINEARS.items():
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, columns), (out, 3)))
        arrays |= {f"{name}/A": a, f"{name}/B": b}
        model.get_parameter(f"{name}.weight").data += SCALE * torch.from_numpy(b @ a)
    (root / "ckpt").mkdir()
    np.savez(root / "ckpt" / "adapter.npz", **arrays)
    config = {"scale": SCALE, "base": "narrow-t5"}
    (root / "ckpt" / "adapter.json").write_text(json.dumps(config))
    return Made(root / "ckpt", root / "base", model)


@pytest.fixture(scope="module")
def eptc(packages: Path) -> Callable[..., Any]:
    """Return a function that runs the command line in a process that sees the packages."""

    def run(*arguments: object, installed: bool = True) -> Any:
        path = [str(packages), str(ROOT)] if installed else [str(ROOT)]
        return subprocess.run(
            [sys.executable, "-c", "from eptc.cli import main; main()", *map(str, arguments)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def bundle(eptc: Any, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that all three packages have a part in; the format is told from the folder."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    done = eptc(
        "export", made.ckpt, "--base", made.base, "-o", out, "--target", "typescript",
        "--pass", "powers-as-products:largest=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "parity passed" in done.stdout
    return out


def test_the_engine_answers_like_the_merged_model(bundle: Path, made: Made) -> None:
    from eptc.runtime import Engine

    ids, tokens = np.array([[5, 9, 11, 1]]), np.array([[0, 7, 3]])
    with torch.no_grad():
        want = made.model(
            input_ids=torch.from_numpy(ids), decoder_input_ids=torch.from_numpy(tokens)
        ).logits.numpy()
    mask = np.ones_like(ids)
    with Engine.load(bundle, providers=["cpu"]) as engine:
        encoded = engine.run({"input_ids": ids, "attention_mask": mask}, "encoder")
        feeds = {n.replace("present.", "past_key_values."): v for n, v in encoded.items()
                 if n.startswith("present.")}  # fmt: skip
        for layer in range(2):
            for part in ("key", "value"):
                empty = np.zeros((1, 4, 0, 8), np.float32)
                feeds[f"past_key_values.{layer}.decoder.{part}"] = empty
        feeds |= {"input_ids": tokens, "encoder_attention_mask": mask}
        got = engine.run(feeds, "decoder")["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_pass_left_no_powers(bundle: Path, eptc: Any, made: Made, tmp_path: Path) -> None:
    done = eptc("export", made.ckpt, "--base", made.base, "-o", tmp_path / "out",
                "--optimize-for", "any", "--no-verify")  # fmt: skip
    assert done.returncode == 0, done.stderr

    def operators(path: Path) -> Counter[str]:
        graph = onnx.load(path, load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)

    for name in ("encoder.onnx", "decoder.onnx"):
        before, after = operators(tmp_path / "out" / name), operators(bundle / name)
        assert before["Pow"] > 0
        assert after["Pow"] == 0
        assert after["Mul"] - before["Mul"] == before["Pow"]


def test_the_manifest_says_where_things_come_from(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert manifest.parity["passed"]
    assert manifest.checkpoint["format"] == "npz"
    assert manifest.checkpoint["origin"] == "eptc-npz 0.1.0"
    assert manifest.target == "typescript"
    assert manifest.optimized_for == "any"
    passes = {step["name"]: step for step in manifest.passes}
    assert list(passes)[-2:] == ["powers-as-products", "stable-names"]
    assert passes["powers-as-products"]["options"] == {"largest": 3}
    assert passes["powers-as-products"]["origin"] == "eptc-powers 0.1.0"
    assert "origin" not in passes["stable-names"]
    used = {name: v for name, v in manifest.tools.items() if name.startswith("eptc-")}
    assert used == {"eptc-npz": "0.1.0", "eptc-powers": "0.1.0", "eptc-typescript": "0.1.0"}


def test_the_declarations_are_part_of_the_bundle(bundle: Path) -> None:
    text = (bundle / "engine.d.ts").read_text()
    assert '  /** [batch, sequence] */\n  "input_ids": TypedTensor<"int64">;' in text
    assert 'export declare const decoderFile: "decoder.onnx";' in text
    manifest = load_manifest(bundle)
    declared = {
        tensor.name
        for graph in manifest.graphs.values()
        for tensor in (*graph.inputs, *graph.outputs)
    }
    assert all(f'"{name}"' in text for name in declared)
    assert "engine.d.ts" in manifest.files


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_bundle_needs_none_of_the_packages(bundle: Path, eptc: Any, verb: str) -> None:
    done = eptc(verb, bundle, "--json", installed=False)
    assert done.returncode == 0, done.stderr


def test_parity_again(bundle: Path, eptc: Any, made: Made) -> None:
    """With the package that reads the checkpoint; without it, what to install is said."""
    options = ("parity", bundle, "--reference", made.ckpt, "--base", made.base)
    done = eptc(*options)
    assert (done.returncode, "parity passed" in done.stdout) == (0, True), done.stderr
    done = eptc(*options, installed=False)
    assert done.returncode == 2
    assert "format 'npz', which the package eptc-npz reads" in done.stderr
    assert "install eptc-npz (0.1.0 made the bundle)" in done.stderr


def test_checkpoints_are_inspected(eptc: Any, made: Made) -> None:
    done = eptc("inspect", made.ckpt, "--base", made.base, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["format"], report["origin"]) == ("npz", "eptc-npz 0.1.0")
    assert (report["adapted_linears"], report["scale"]) == (2, SCALE)
    done = eptc("inspect", made.ckpt)
    assert "the model that the checkpoint calls 'narrow-t5'" in done.stderr
    done = eptc("inspect", made.ckpt, "--base", made.base, installed=False)
    assert done.returncode == 2
    assert "neither ept_config.json nor adapter_config.json" in done.stderr


def test_doctor_lists_them(eptc: Any) -> None:
    report = json.loads(eptc("doctor", "--json").stdout)
    assert report["readers"] == {"npz (eptc-npz 0.1.0)": "ready"}
    assert report["passes"] == {"powers-as-products (eptc-powers 0.1.0)": "ready"}
    assert report["targets"]["typescript (eptc-typescript 0.1.0)"] == "ready"
    assert report["targets"]["onnx"] == "ready"


def test_a_reader_that_is_wrong_is_found_out(packages: Path, made: Made, tmp_path: Path) -> None:
    """The example's reference shares no code with its reader, so the gate sees the difference."""
    site = tmp_path / "site"
    shutil.copytree(packages, site)
    reader = site / "eptc_npz" / "__init__.py"
    text = reader.read_text()
    assert 'Constant(1.0), config["scale"])' in text
    reader.write_text(text.replace('Constant(1.0), config["scale"])', "Constant(1.0), 1.0)"))
    done = subprocess.run(
        [sys.executable, "-c", "from eptc.cli import main; main()", "export", made.ckpt,
         "--base", made.base, "-o", tmp_path / "out"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 1
    assert "after the npz reader, the linear" in done.stderr
    assert not (tmp_path / "out").exists()
