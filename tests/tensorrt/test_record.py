"""Built engines are refused where they were not built for, and each message says what to do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from eptc.errors import BundleError, InputError
from eptc.tensorrt.build_engine import RECORD
from eptc.tensorrt.engine import here
from eptc.tensorrt.record import Built, Here, read_record
from eptc.tensorrt.target import missing

HERE = Here("10.15.1.29", "NVIDIA L4", "8.9", "580.65.06")
DATA: dict[str, Any] = {
    "schema_version": 1,
    **dataclasses.asdict(HERE),
    "engines": {"model": {"file": "model.engine", "sha256": "0" * 64, "graph_sha256": "1" * 64}},
}


def test_here_as_there() -> None:
    Built.from_json(DATA).check(HERE)
    Built.from_json(DATA).check(dataclasses.replace(HERE, driver="581.1"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensorrt": "10.15.1.30"}, ["built by TensorRT 10.15.1.29, and here is 10.15.1.30",
                                      "pip install tensorrt==10.15.1.29"]),
        ({"tensorrt": "11.0.0"}, ["here is 11.0.0"]),
        ({"gpu": "NVIDIA H100", "compute_capability": "9.0"},
         ["for NVIDIA L4 (compute capability 8.9), and here is NVIDIA H100 (9.0)",
          "the compute capability 8.9"]),
        ({"gpu": "NVIDIA L40"}, ["here is NVIDIA L40 (8.9)", "expected: the GPU NVIDIA L4"]),
        ({"driver": "570.133.20"}, ["under the NVIDIA driver 580.65.06, and here is 570.133.20",
                                    "update the driver"]),
        ({"driver": "580.9.1"}, ["the driver 580.65.06 or newer"]),
    ],
)  # fmt: skip
def test_elsewhere(change: dict[str, str], words: list[str]) -> None:
    """Another TensorRT, another GPU, an older driver."""
    with pytest.raises(BundleError) as caught:
        Built.from_json(DATA).check(dataclasses.replace(HERE, **change))
    for each in (*words, "run build_engine.py of the bundle here"):
        assert each in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "has schema version 2"),
        ({"gpu": None}, "gpu"),
        ({"more": 1}, "more"),
        ({"engines": {"model": {"file": "../x", "sha256": "", "graph_sha256": ""}}}, "'../x'"),
        ({"engines": {"model": {"file": "x"}}}, "sha256"),
    ],
)
def test_no_record(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({**DATA, **change}))
    with pytest.raises(BundleError, match=words):
        read_record(tmp_path)


def test_record_is_missing(tmp_path: Path) -> None:
    """As where trtexec built the engines."""
    with pytest.raises(BundleError, match=r"has no engines\.json.*(?s:.*)--record"):
        read_record(tmp_path)


def test_files(tmp_path: Path) -> None:
    """An engine of another graph, none, or a damaged one."""
    (tmp_path / "model.engine").write_bytes(b"plan")
    digest = hashlib.sha256(b"plan").hexdigest()
    data = json.loads(json.dumps(DATA))
    data["engines"]["model"]["sha256"] = digest
    built = Built.from_json(data)
    assert built.check_files(tmp_path, {"model": "1" * 64}) == {"model": tmp_path / "model.engine"}
    with pytest.raises(BundleError, match="was built of another graph 'model'"):
        built.check_files(tmp_path, {"model": "2" * 64})
    with pytest.raises(BundleError, match="there is no engine of graph 'decoder'"):
        built.check_files(tmp_path, {"decoder": "1" * 64})
    (tmp_path / "model.engine").write_bytes(b"plan!")
    with pytest.raises(BundleError, match=r"model\.engine has SHA-256"):
        built.check_files(tmp_path, {"model": "1" * 64})


def test_nothing_to_run_them() -> None:
    """Without TensorRT or a GPU it is said which of them is missing."""
    lacking = missing()
    if lacking is None:
        assert here().gpu
        return
    with pytest.raises(InputError) as caught:
        here()
    assert caught.value.found == lacking
