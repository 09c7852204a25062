"""A graph at one shape, on buffers of its own; on CUDA captured once and replayed.

A captured run is launched as a whole, without the CPU's work for each kernel: that is most of the
time of a small batch. Capture wants the same shape and the same addresses each time, every node
on the CUDA provider, no control flow, and no copy between CPU and GPU inside the graph; ONNX
Runtime refuses to open a session that is asked to capture and has anything else.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from eptc.errors import InputError, OptionError, TaskError
from eptc.runtime.device_arrays import DeviceArray, check_whole
from eptc.runtime.feeds import checked
from eptc.runtime.graph import element_type
from eptc.runtime.inputs import positive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eptc.runtime.graph import Graph, NumpyArray
    from eptc.runtime.manifest import Manifest
    from eptc.runtime.spec import TensorSpec

__all__ = ["FixedShape", "fixed_shape"]


class FixedShape:
    """A classifier at one shape. Make one with `Engine.fixed`.

    Threads may share it and take turns. ONNX Runtime captures once for each thread that calls:
    a server asks it from one.

    Args:
        graph: the graph.
        manifest: its engine's.
        batch: rows of every run.
        sequence: tokens of every row.
    """

    def __init__(self, graph: Graph, manifest: Manifest, batch: int, sequence: int) -> None:
        self.batch = batch
        self.sequence = sequence
        self._manifest = manifest
        self._graph = graph
        self._turn = threading.Lock()
        self._inputs = {spec.name: self._buffer(spec) for spec in graph.spec.inputs}
        self._outputs = {spec.name: self._buffer(spec) for spec in graph.spec.outputs}
        self._run = graph.bound_to(self._inputs, self._outputs)

    @property
    def captures(self) -> bool:
        """Whether runs are captured and replayed: on CUDA, where the engine was loaded so."""
        return self._graph.captures

    @property
    def inputs(self) -> dict[str, DeviceArray]:
        """The buffers that runs read; they may be written by DLPack."""
        return {name: DeviceArray(value) for name, value in self._inputs.items()}

    @property
    def outputs(self) -> dict[str, DeviceArray]:
        """The buffers that runs write, each over what the one before left there."""
        return {name: DeviceArray(value) for name, value in self._outputs.items()}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NumpyArray]:
        """Answer a batch that is no larger than the shape; what is missing is padded.

        Args:
            feeds: as for `Engine.run`, up to `batch` rows of up to `sequence` tokens.

        Returns:
            Every output by name, of the rows that were given: copies.

        Raises:
            InputError: feeds that do not fit the graph, or are larger than the shape.
        """
        arrays = checked(
            feeds, self._graph.name, self._graph.spec, self._manifest.vocab_size,
            self._manifest.tasks,
        )  # fmt: skip
        rows, tokens = arrays["input_ids"].shape
        if rows > self.batch or tokens > self.sequence:
            raise InputError(
                f"the batch has {rows} rows of {tokens} tokens",
                expected=f"at most {self.batch} rows of {self.sequence} tokens",
                fix="call fixed with a larger shape, or call run, which takes any",
            )
        self._graph.check_process()  # before the lock: a fork may have left it held
        with self._turn:
            for name, array in arrays.items():
                self._inputs[name].update_inplace(self._padded(name, array))
            self._run()
            return {name: np.array(value.numpy()[:rows]) for name, value in self._outputs.items()}

    def replay(self) -> None:
        """Run on what `inputs` hold and write `outputs`; nothing is copied, nothing is checked.

        Whoever writes the buffers from a stream of their own waits for it first.
        """
        self._graph.check_process()
        with self._turn:
            self._run()

    def __repr__(self) -> str:
        how = "captured" if self.captures else "not captured"
        return f"<FixedShape {self.batch} x {self.sequence} on {self._graph.device[0]}, {how}>"

    def _buffer(self, spec: TensorSpec) -> Any:
        import onnxruntime

        sizes = {"batch": self.batch, "sequence": self.sequence}
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type(spec.dtype), *self._graph.device
        )
        if spec.dtype == "int64":  # memory as it comes would be tokens from anywhere
            value.update_inplace(self._padded(spec.name, np.zeros([0] * len(shape), np.int64)))
        return value

    def _padded(self, name: str, array: NumpyArray) -> NumpyArray:
        tokenizer = self._manifest.tokenizer
        pad = tokenizer.pad_token_id if name == "input_ids" and tokenizer is not None else 0
        shape = (self.batch, self.sequence)[: array.ndim]
        padded = np.full(shape, pad, array.dtype)
        padded[tuple(slice(size) for size in array.shape)] = array
        if name == "attention_mask":
            # A row of nothing but padding has no mean and no softmax: it sees one token.
            padded[len(array) :, 0] = 1
        return padded


def fixed_shape(graph: Graph, manifest: Manifest, batch: int, sequence: int) -> FixedShape:
    """Return a classifier's graph at one shape.

    Raises:
        OptionError: a shape that is none, or answers that padding would change.
        TaskError: the engine writes text, a step at a time and longer with each.
    """
    positive("batch", batch)
    positive("sequence", sequence)
    if manifest.kind != "encoder-classifier":
        raise TaskError(
            "this engine writes text: each of its steps has another shape",
            expected="an engine that classifies",
        )
    check_whole(graph, "fixed")
    limit = None if manifest.tokenizer is None else manifest.tokenizer.max_length
    if limit is not None and sequence > limit:
        raise OptionError(f"sequence is {sequence}", expected=f"at most {limit}, the model's most")
    if manifest.routing.mode == "batch" or manifest.routing.reads_padding:
        raise OptionError(
            f"the engine cannot be padded to a shape: {manifest.routing.meaning}",
            fix="call run, or export it with --routing per-sample or frozen",
        )
    if any(spec.dtype != "int64" for spec in graph.spec.inputs):
        raise OptionError("the graph reads other inputs than token ids and masks")
    return FixedShape(graph, manifest, batch, sequence)
