"""What the script of a bundle says where it cannot build or record engines."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path

import pytest

from eptc.tensorrt import build_engine
from eptc.tensorrt.build_engine import RECORD, BuildError, package, record, with_earlier
from eptc.tensorrt.record import EngineFile, Here, read_record
from eptc.tensorrt.target import missing


@pytest.mark.parametrize(
    ("version", "words"), [(None, "tensorrt does not load"), ("8.6.1", "TensorRT 8.6.1 is here")]
)
def test_the_package(version: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, or one that knows no strongly typed networks: `--build` is refused at once."""
    found = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    with pytest.raises(BuildError, match=words):
        package()
    assert words in str(missing())


def test_nothing_to_record(tmp_path: Path) -> None:
    """`--record` before trtexec ran."""
    with pytest.raises(BuildError, match="there are no engines in"):
        record(tmp_path, {"model": {"file": "model.onnx"}})


def test_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes of an engine and of its graph; a graph without an engine is left out."""
    by = {"gpu": "L4", "compute_capability": "8.9", "driver": "570.86.10"}
    monkeypatch.setattr(build_engine, "machine", lambda: by)
    trt = types.SimpleNamespace(__version__="10.15.1")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    for name in ("encoder.onnx", "decoder.onnx", "decoder.engine"):
        (tmp_path / name).write_text(name)
    found = record(tmp_path, {r: {"file": f"{r}.onnx"} for r in ("encoder", "decoder")})
    digests = {
        name: hashlib.sha256(name.encode()).hexdigest()
        for name in ("decoder.engine", "decoder.onnx")
    }
    (tmp_path / RECORD).write_text(json.dumps(found))
    read = read_record(tmp_path)
    assert read.by == Here("10.15.1", **by)
    assert read.engines == {"decoder": EngineFile("decoder.engine", *digests.values())}


@pytest.mark.parametrize(
    ("before", "engines"),
    [
        (None, ["decoder"]),
        ("{", ["decoder"]),
        ("[]", ["decoder"]),
        ('{"gpu": "L4", "tensorrt": "10.15", "engines": {"encoder": 1, "decoder": 1}}',
         ["decoder", "encoder"]),
        ('{"gpu": "L4", "tensorrt": "10.14", "engines": {"encoder": 1}}', ["decoder"]),
        ('{"gpu": "A10G", "tensorrt": "10.15", "engines": {"encoder": 1}}', ["decoder"]),
    ],
)  # fmt: skip
def test_one_graph_at_a_time(before: str | None, engines: list[str], tmp_path: Path) -> None:
    """What was recorded before stays where TensorRT and the GPU are the same, and only there."""
    if before is not None:
        (tmp_path / RECORD).write_text(before)
    found = {"gpu": "L4", "tensorrt": "10.15", "engines": {"decoder": 2}}
    merged = with_earlier(tmp_path, found)
    assert sorted(merged["engines"]) == engines
    assert merged["engines"]["decoder"] == 2
