"""What observing a graph holds in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

VALUES, ROWS = 40, 2048  # of 8 MB each

# Prints by how many MB the process grew while a graph ran with all its values observed.
MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from eptc.calibration.taps import Extremes

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

tap = Extremes(Path(sys.argv[1]), "model.onnx", [f"v{i}" for i in range(int(sys.argv[2]))])
x = np.random.default_rng(0).normal(size=(int(sys.argv[3]), 1024)).astype(np.float32)
before = peak()
tap.run({"x": x})
assert (tap.high > 0).all() and (tap.sizes == x.size).all()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_values_are_let_go(tmp_path: Path) -> None:
    """A few values at a time are in memory, not all that are observed."""
    nodes = [
        onnx.helper.make_node("Tanh", [f"v{i - 1}" if i else "x"], [f"v{i}"])
        for i in range(VALUES)
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 1024])
        for name in ("x", f"v{VALUES - 1}")
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10),
        tmp_path / "model.onnx",
    )
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(VALUES), str(ROWS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) < 8 * VALUES / 3
