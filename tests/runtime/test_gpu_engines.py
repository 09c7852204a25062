"""Engines on a GPU: they run wherever there is one, and say why not elsewhere."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc.runtime import Engine
from tests.conftest import Folders

pytestmark = pytest.mark.gpu

TEXTS = ["the film was good", "bad", "a very long and quiet film", "not dull and not short"]
CAPTURING: Any = [("cuda", {"enable_cuda_graph": "1"})]


@pytest.fixture(scope="module")
def bundle(
    cuda: str, small_native: Folders, tmp_path_factory: pytest.TempPathFactory
) -> eptc.Bundle:
    """A classifier, fused for CUDA and verified on the CPU."""
    assert cuda
    out = tmp_path_factory.mktemp("cuda") / "tone"
    return eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", out=out, optimize_for="cuda"
    )


@pytest.fixture(scope="module")
def tensorrt() -> str:
    """The TensorRT provider, where it starts."""
    from eptc.runtime import probe_providers

    name = "TensorrtExecutionProvider"
    if (reason := probe_providers().get(name, "not built in")) is not None:
        pytest.skip(f"needs TensorRT: {reason}")
    return name


def test_the_same_answers(bundle: eptc.Bundle) -> None:
    """All of the graph is on the GPU, or loading it would be an error."""
    with bundle.load(providers=["cpu"]) as here, bundle.load(providers=["cuda"]) as there:
        assert there.providers[0] == "CUDAExecutionProvider"
        expected = here.run(here.tokenize(TEXTS))["logits"]
        found = there.run(there.tokenize(TEXTS))["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_parity(bundle: eptc.Bundle, small_native: Folders) -> None:
    eptc.parity(
        bundle.path, reference=small_native.ckpt, base=small_native.base, providers=["cuda"]
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8-static", "int4"])
def test_parity_of_precisions(
    cuda: str, precision: Any, small_native: Folders, tmp_path: Path
) -> None:
    """16-bit engines are compared themselves, not their twins: a GPU computes in 16 bits."""
    assert cuda
    out, rows = tmp_path / precision, tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    folders: dict[str, Any] = {"base": small_native.base}
    eptc.export(
        small_native.ckpt, **folders, task="tone", out=out, optimize_for="cuda",
        precision=precision, calibration=rows if precision == "int8-static" else None,
    )  # fmt: skip
    eptc.parity(out, reference=small_native.ckpt, **folders, providers=["cuda"])


def test_tensors_of_pytorch(bundle: eptc.Bundle) -> None:
    """In and out by DLPack on the GPU, on a stream of PyTorch's own, without a copy."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a PyTorch with CUDA")
    with bundle.load(providers=["cuda"]) as engine:
        feeds = engine.tokenize(TEXTS)
        expected = engine.run(feeds)["logits"]
        with torch.cuda.stream(torch.cuda.Stream()):
            tensors = {}
            for name, array in feeds.items():
                late = torch.zeros(array.shape, dtype=torch.int64, device="cuda")
                torch.cuda._sleep(10_000_000)  # the values come long after the call
                late += torch.from_numpy(array).cuda()
                tensors[name] = late
            logits = torch.from_dlpack(engine.run_device(tensors)["logits"])
        assert logits.is_cuda
        np.testing.assert_array_equal(logits.cpu().numpy(), expected)
        kept = logits.clone()
    del engine
    gc.collect()
    others = [torch.full_like(kept, 3.0) for _ in range(64)]
    assert torch.equal(logits, kept)
    del others


def test_captured(bundle: eptc.Bundle) -> None:
    """Captured runs answer as plain ones, shape by shape, call by call."""
    with bundle.load(providers=CAPTURING) as engine:
        shapes = [engine.fixed(4, 16), engine.fixed(2, 8)]
        assert all(shape.captures for shape in shapes)
        for texts in (TEXTS[:2], TEXTS[1:3], TEXTS[:1], TEXTS[2:4]):
            feeds = engine.tokenize(texts)
            expected = engine.run(feeds)["logits"]
            for shape in shapes:
                found = shape.run(feeds)["logits"]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_tensorrt_keeps_its_engines(
    tensorrt: str, small_native: Folders, bundle: eptc.Bundle, tmp_path: Path
) -> None:
    assert tensorrt
    out = tmp_path / "tone"
    eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", out=out, optimize_for="any"
    )
    with bundle.load(providers=["cpu"]) as engine:
        feeds = engine.tokenize(TEXTS)
        expected = engine.run(feeds)["logits"]
    shapes = {n: {"min": [1, 1], "opt": [4, 8], "max": [8, 24]} for n in feeds}
    for options in (
        {"cache": tmp_path / "cache", "profiles": {"model": shapes}},
        {"context": tmp_path / "context", "profiles": {"model": shapes}},
    ):
        for _ in range(2):  # built, then found
            with Engine.load(out, [("tensorrt", options), "cuda"]) as engine:
                found = engine.run(feeds)["logits"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)
            gc.collect()
    assert list((tmp_path / "cache").glob("*/*.engine"))
    assert (tmp_path / "context" / "model_ctx.onnx").is_file()
