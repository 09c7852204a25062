"""--precision keep: half the bytes, the same answers within what 16-bit weights can hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy

import eptc
from eptc import skeletons

TASKS = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
NAMES = {np.float16: ("float16", "fp16-weights"), ml_dtypes.bfloat16: ("bfloat16", "bf16-weights")}
TEXTS = ["a warm, funny film", "it broke after a day", "x"]


def narrowed(source: Path, target: Path, dtype: Any) -> Path:
    """Copy a base, its weights rounded to a 16-bit type."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        path.chmod(0o644)
        tensors = safetensors.numpy.load_file(path)
        rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        path.unlink()
        safetensors.numpy.save_file(rounded, path, metadata={"format": "pt"})
    config = target / "config.json"
    config.chmod(0o644)
    data = json.loads(config.read_text()) | {"dtype": NAMES[dtype][0]}
    config.write_text(json.dumps(data))
    return target


def build(golden: Path, base: Path, name: str, out: Path, **options: Any) -> eptc.Bundle:
    built: eptc.Bundle = eptc.export(
        golden / "ept" / name / "adapter", base=base, task="sst2", tasks=TASKS, top_k=2, out=out,
        **options,
    )  # fmt: skip
    return built


@pytest.mark.parametrize("dtype", NAMES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_half_the_bytes_and_the_same_answers(
    golden: Path, tmp_path: Path, name: str, dtype: Any
) -> None:
    base = narrowed(golden / "ept" / name / "base", tmp_path / "base", dtype)
    wide = build(golden, base, name, tmp_path / "wide")
    kept = build(golden, base, name, tmp_path / "kept", precision="keep")
    assert kept.manifest.precision == NAMES[dtype][1]
    assert kept.manifest.parity["mode"] == "block by block"
    assert kept.manifest.parity["passed"]
    sizes = [b.manifest.files["weights.bin"].size for b in (kept, wide)]
    assert sizes[0] < 0.6 * sizes[1]
    kinds = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    for file in kept.path.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        matrices = [t for t in graph.initializer if len(t.dims) == 2 and t.external_data]
        assert matrices
        assert all(t.data_type in kinds for t in matrices)
    with wide.load() as one, kept.load() as other:
        before = one.classify([{"sentence": text} for text in TEXTS])
        after = other.classify([{"sentence": text} for text in TEXTS])
    for a, b in zip(before, after, strict=True):
        assert a.probabilities is not None
        assert b.probabilities is not None
        # A weight moves by half a step of its type: 2**-12 or 2**-9 of itself.
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=0.05)


def test_float32_is_kept_as_it_is(golden: Path, tmp_path: Path) -> None:
    base = golden / "ept" / "t5-tiny" / "base"
    kept = build(golden, base, "t5-tiny", tmp_path / "kept", precision="keep", verify=False)
    wide = build(golden, base, "t5-tiny", tmp_path / "wide", verify=False)
    assert kept.manifest.precision == "fp32"
    for name in ("weights.bin", "encoder.onnx", "decoder.onnx"):
        assert (kept.path / name).read_bytes() == (wide.path / name).read_bytes()


def test_parity_again(golden: Path, tmp_path: Path, cli: Any) -> None:
    name = "llama-tiny"
    base = narrowed(golden / "ept" / name / "base", tmp_path / "base", np.float16)
    build(golden, base, name, tmp_path / "kept", precision="keep", verify=False)
    result = cli(
        "parity", tmp_path / "kept", "--reference", golden / "ept" / name / "adapter",
        "--base", base, "--json",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout)["summary"]["mode"] == "block by block"


def test_both_share_a_trace(golden: Path, tmp_path: Path) -> None:
    base = golden / "ept" / "t5-tiny" / "base"
    build(golden, base, "t5-tiny", tmp_path / "wide", verify=False)
    misses = skeletons._skeleton.cache_info().misses
    build(golden, base, "t5-tiny", tmp_path / "any", verify=False, optimize_for="any")
    assert skeletons._skeleton.cache_info().misses == misses


@pytest.mark.parametrize("provider", ["any", "cuda"])
def test_providers(golden: Path, tmp_path: Path, provider: Any) -> None:
    """Fused or not, the engine gives the reference's answers; `any` has standard operators."""
    base = golden / "ept" / "llama-tiny" / "base"
    built = build(golden, base, "llama-tiny", tmp_path / "out", optimize_for=provider)
    assert built.manifest.parity["passed"]
    assert built.manifest.optimized_for == provider
    graph = onnx.load(built.path / "model.onnx", load_external_data=False).graph
    domains = {node.domain for node in graph.node}
    assert domains == ({""} if provider == "any" else {"", "com.microsoft"})


@pytest.mark.parametrize("precision", ["int8-static", "fp8", "int8-fp16", "fp8-fp16"])
@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_explicit_quantization(golden: Path, tmp_path: Path, name: str, precision: Any) -> None:
    """Standard operators, proven as published; kept graphs give the same answers.

    T5 has a Relu before QuantizeLinear, which ONNX Runtime drops where it fuses fp8.
    """
    rows = tmp_path / "rows.jsonl"
    texts = [{"sentence": text * n} for text in TEXTS for n in (1, 3)]
    rows.write_text("\n".join(map(json.dumps, texts)))
    built = build(
        golden, golden / "ept" / name / "base", name, tmp_path / "out", precision=precision,
        optimize_for="any", calibration=rows,
    )  # fmt: skip
    assert built.manifest.precision == precision
    assert built.manifest.parity["passed"]
    assert built.manifest.parity["exact"]["passed"]
    fp8 = precision.startswith("fp8")
    number = onnx.TensorProto.FLOAT8E4M3FN if fp8 else onnx.TensorProto.INT8
    for file in built.path.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        assert {node.domain for node in graph.node} == {""}
        stored = [t for t in graph.initializer if t.data_type == number]
        assert sum(len(t.dims) == 2 for t in stored) > 5
    with built.load() as one, built.load(cache=tmp_path / "kept") as kept:
        assert [a.probabilities for a in one.classify(texts)] == [
            a.probabilities for a in kept.classify(texts)
        ]
    if fp8:
        assert any((tmp_path / "kept").iterdir())
    assert eptc.verify(built.path)
