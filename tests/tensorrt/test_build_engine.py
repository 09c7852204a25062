"""What the script of a bundle says where it cannot build or record engines."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from eptc.tensorrt.build_engine import BuildError, package, record
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
