"""Bare ONNX Runtime sessions: what a careful user of an exporter without a runtime writes.

Imported in every environment. Caches stay in ONNX Runtime's memory from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__all__ = ["Bound", "as_values", "greedy", "one_output", "open_session"]

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}  # fmt: skip


def open_session(path: Path, threads: int) -> Any:
    """Return a session with ONNX Runtime's defaults and a number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def one_output(session: Any, inputs: Mapping[str, Any], output: str | None) -> Callable[[], Any]:
    """Return what runs a session on arrays and returns one output; None: the first."""
    wanted = {node.name for node in session.get_inputs()}
    taken = {name: array for name, array in inputs.items() if name in wanted}
    name = output or session.get_outputs()[0].name
    return lambda: session.run([name], taken)[0]


def as_values(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays as ONNX Runtime values."""
    return {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in arrays.items()
    }


class Bound:
    """A session whose inputs and outputs are values in ONNX Runtime's memory.

    Args:
        session: on the CPU.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = {node.name: node for node in session.get_inputs()}
        self.outputs = [node.name for node in session.get_outputs()]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on values by name, of which more may be given than the graph takes."""
        binding = self.session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def empty(self, batch: int) -> dict[str, Any]:
        """Return an empty past for every cache input: float [batch, heads, 0, width]."""
        arrays = {}
        for name, node in self.inputs.items():
            if "past_key_values" in name:
                heads, width = node.shape[1], node.shape[3]
                arrays[name] = np.zeros((batch, heads, 0, width), _DTYPES[node.type])
        return as_values(arrays)


def greedy(
    step: Callable[[Any, int], Any], first: Any, new_tokens: int, stops: Sequence[int]
) -> Any:
    """Decode greedily until every row has stopped.

    Args:
        step: from ids [batch, length] and the number of tokens before them to logits
            [batch, length, vocabulary].
        first: ids of the first step.
        new_tokens: tokens a row at most.
        stops: ids that end a row.

    Returns:
        ids [batch, tokens].
    """
    rows, running, ids, past = [], np.ones(len(first), bool), first, 0
    for _ in range(new_tokens):
        chosen = step(ids, past)[:, -1].argmax(axis=-1)
        rows.append(chosen)
        running &= ~np.isin(chosen, stops)
        if not running.any():
            break
        past += ids.shape[1]
        ids = chosen[:, None].astype(np.int64)
    return np.stack(rows, axis=1)
