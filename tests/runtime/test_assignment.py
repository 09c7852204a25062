"""Where nodes run, and what counts as falling back."""

from __future__ import annotations

from typing import Any

import onnx.parser
import onnxruntime
import pytest

from eptc.errors import OptionError
from eptc.runtime import Engine
from eptc.runtime.assignment import RECORD, Assigned, assigned, check_assignment, fallback
from eptc.runtime.pack import open_engine

CPU, CUDA, TENSORRT = (
    f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt")
)  # fmt: skip

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[n] x, float[4, 3] w) => (float[n, 3] y, int64[1] size) {
  size = Shape(x)
  columns = Constant<value_ints = [4]>()
  shape = Concat<axis = 0>(size, columns)
  ones = ConstantOfShape(shape)
  y = MatMul(ones, w)
}
"""


def session(record: bool) -> Any:
    options = onnxruntime.SessionOptions()
    if record:
        options.add_session_config_entry(*RECORD)
    model = onnx.parser.parse_model(GRAPH).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=[CPU])


needs_record = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason=f"needs ONNX Runtime 1.24 or newer; this is {onnxruntime.__version__}",
)


@needs_record
def test_a_session_says_where_its_nodes_run() -> None:
    nodes = assigned(session(record=True))
    assert nodes is not None
    assert {node.provider for node in nodes} == {CPU}
    assert {"Shape", "Concat", "MatMul"} <= {node.op_type for node in nodes}
    assert assigned(session(record=False)) is None


def on(provider: str, *op_types: str) -> list[Assigned]:
    return [Assigned(provider, op_type, f"layer.0/{op_type}") for op_type in op_types]


FELL: dict[str, tuple[list[Assigned], list[str], str | None]] = {
    "all on CUDA": (on(CUDA, "MatMul", "Softmax"), [CUDA], None),
    "shapes on the CPU": (on(CUDA, "MatMul") + on(CPU, "Shape", "Gather", "Concat"), [CUDA], None),
    "CUDA beside TensorRT": (on(TENSORRT, "MatMul") + on(CUDA, "Erf"), [TENSORRT, CUDA], None),
    "the CPU was asked for": (on(CPU, "MatMul"), [CPU], None),
    "an empty graph": ([], [CUDA], None),
    "one node": (
        on(CUDA, "MatMul") + on(CPU, "Shape", "MatMulInteger"), [CUDA],
        "1 of 3 nodes run on the CPU: MatMulInteger (layer.0/MatMulInteger)",
    ),
    "more than are named": (
        on(CPU, "Erf", "MatMul", "Softmax", "Tanh"), [CUDA],
        "4 of 4 nodes run on the CPU: Erf, MatMul, Softmax, Tanh "
        "(layer.0/Erf, layer.0/MatMul, layer.0/Softmax)",
    ),
    "the CPU was listed": (on(CUDA, "Erf") + on(CPU, "MatMul"), [CUDA, CPU], "1 of 2 nodes"),
    "nothing on it": (on(CUDA, "MatMul"), [TENSORRT, CUDA], "none of 1 nodes runs on it"),
    "only shapes on it": (on(CPU, "Shape"), [CUDA], "none of 1 nodes runs on it"),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "wanted", "reason"), FELL.values(), ids=FELL)
def test_what_fell_back(nodes: list[Assigned], wanted: list[str], reason: str | None) -> None:
    found = fallback(nodes, wanted)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and found.startswith(reason))


@needs_record
def test_a_session_that_fell_back_is_refused() -> None:
    """A real session on the CPU, judged as one that was asked to run on CUDA."""
    with pytest.raises(OptionError, match="1 of 4 nodes run on the CPU: MatMul") as refusal:
        check_assignment(session(record=True), [(CUDA, {})])
    assert "allow_fallback=True" in str(refusal.value)
    check_assignment(session(record=True), [(CPU, {})])


def test_a_session_that_does_not_say_is_refused() -> None:
    with pytest.raises(OptionError, match="does not say which nodes") as refusal:
        check_assignment(session(record=False), [(CUDA, {}), (CPU, {})])
    assert "upgrade onnxruntime-gpu" in str(refusal.value)


@pytest.mark.parametrize("allowed", [False, True])
def test_every_session_is_judged(
    classifier: Any, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """Loading asks where nodes run, unless the caller takes it as it is."""
    asked: list[Any] = []
    monkeypatch.setattr(
        "eptc.runtime.session.check_assignment", lambda *given: asked.append(given)
    )
    # A number of threads that no other test shares its session with.
    with Engine.load(classifier.path, ["cpu"], threads=7, allow_fallback=allowed):
        assert len(asked) == (0 if allowed else 1)
    with open_engine(classifier.path, providers=["cpu"], threads=6, allow_fallback=allowed):
        assert len(asked) == (0 if allowed else 2)
