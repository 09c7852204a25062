"""How sessions are opened: on processors whose 8-bit sums overflow, and without a record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from eptc.errors import BundleError
from eptc.runtime.assignment import RECORD, assigned
from eptc.runtime.session import open_session

WEIGHT = np.full((64, 32), 127, np.int8)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A graph that multiplies unsigned numbers with the largest signed weights."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, 32])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save(model, tmp_path / "product.onnx")
    return tmp_path / "product.onnx"


@pytest.mark.parametrize("overflows", [False, True])
def test_eight_bit_sums(product: Path, overflows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums would be cut to 16 bits the session is told; they are right either way."""
    monkeypatch.setattr("eptc.runtime.session.saturates", lambda: overflows)
    session = open_session(product, [("CPUExecutionProvider", {})], threads=1)
    options = session.get_session_options()
    key = "session.x64quantprecision"
    if overflows:
        assert options.get_session_config_entry(key) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(key)
    x = np.full((3, 64), 255, np.uint8)
    (got,) = session.run(None, {"x": x})
    assert (got == 255 * 127 * 64).all()


def test_nothing_is_recorded_on_the_cpu(product: Path) -> None:
    """There is nothing to fall back to, and every node would be named in the session."""
    session = open_session(product, [("CPUExecutionProvider", {})], threads=1)
    assert assigned(session) is None
    with pytest.raises(RuntimeError):
        session.get_session_options().get_session_config_entry(RECORD[0])


def test_a_name_that_is_no_utf_8(product: Path) -> None:
    place = product.rename(product.with_name("g\udcff.onnx"))
    with pytest.raises(BundleError, match="no UTF-8"):
        open_session(place, [("CPUExecutionProvider", {})], threads=1)
