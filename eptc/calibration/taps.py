"""Sessions of a bundle's graph that also report on values inside it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from eptc.calibration.histograms import Histogram
from eptc.errors import BundleError, InternalError
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.graph import NumpyArray
from eptc.runtime.ort_errors import ort_errors

__all__ = ["Extremes", "Moments", "Snapshot", "Tap", "Values"]

# What the names of added values begin with.
_TAP = "eptc.tap."


class Tap(abc.ABC):
    """A session of a graph with more outputs; what they say goes to `report`.

    The weights stay in the bundle's file. Values are those the graph defines: nothing is fused.

    Args:
        folder: the bundle.
        file: the graph's file in it.
        values: float32 values, by name.
    """

    def __init__(self, folder: Path, file: str, values: Sequence[str]) -> None:
        self.values = tuple(values)
        proto = onnx.load(folder / file, load_external_data=False)
        self._names = [output.name for output in proto.graph.output]
        self._extra = self._add(proto.graph) if values else []
        self._session = _session(proto, folder)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """Run the graph, report, and return its own outputs."""
        found = self._session.run([*self._names, *self._extra], dict(feeds))
        own = len(self._names)
        if self.values:
            self.report(found[own:])
        return dict(zip(self._names, found[:own], strict=True))

    @abc.abstractmethod
    def report(self, found: list[NumpyArray]) -> None:
        """Take what the further outputs say of one run."""

    @abc.abstractmethod
    def _add(self, graph: onnx.GraphProto) -> list[str]:
        """Add outputs; return their names."""


class Extremes(Tap):
    """The smallest and largest number of each value over all runs, and its largest size.

    They are found inside ONNX Runtime: three numbers a value leave it.
    """

    def __init__(self, folder: Path, file: str, values: Sequence[str]) -> None:
        super().__init__(folder, file, values)
        self.low = np.full(len(values), np.inf, np.float32)
        self.high = np.full(len(values), -np.inf, np.float32)
        self.sizes = np.zeros(len(values), np.int64)

    def report(self, found: list[NumpyArray]) -> None:
        """Merge the ranges [3, values] and sizes [values] of one run.

        Raises:
            FloatingPointError: a value is not finite; its name is the error's argument.
        """
        low, high, sound = found[0].reshape(3, -1)
        bad = np.flatnonzero(~np.isfinite(sound))
        if bad.size:
            raise FloatingPointError(self.values[bad[0]])
        # An empty value has the range [inf, -inf].
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.sizes = np.maximum(self.sizes, found[1])

    def _add(self, graph: onnx.GraphProto) -> list[str]:
        graph.initializer.append(helper.make_tensor(f"{_TAP}flat", TensorProto.INT64, [1], [-1]))
        graph.initializer.append(helper.make_tensor(f"{_TAP}zero", TensorProto.FLOAT, [], [0.0]))
        kinds: list[list[str]] = [[], [], [], []]

        def tap(number: int, value: str) -> list[onnx.NodeProto]:
            flat, low, high, zeros, sound, size = (f"{_TAP}{number}.{i}" for i in range(6))
            for kind, name in zip(kinds, (low, high, sound, size), strict=True):
                kind.append(name)
            return [
                helper.make_node("Reshape", [value, f"{_TAP}flat"], [flat]),
                helper.make_node("ReduceMin", [flat], [low]),
                helper.make_node("ReduceMax", [flat], [high]),
                # Smallest and largest pass over NaN; a sum does not, and 0 times infinity is NaN.
                helper.make_node("Mul", [flat, f"{_TAP}zero"], [zeros]),
                helper.make_node("ReduceSum", [zeros], [sound]),
                helper.make_node("Shape", [flat], [size]),
            ]

        _insert(graph, self.values, tap)
        low, high, sound, sizes = kinds
        ranges = [f"{_TAP}ranges", f"{_TAP}sizes"]
        graph.node.append(helper.make_node("Concat", low + high + sound, ranges[:1], axis=0))
        graph.node.append(helper.make_node("Concat", sizes, ranges[1:], axis=0))
        graph.output.append(helper.make_tensor_value_info(ranges[0], TensorProto.FLOAT, [None]))
        graph.output.append(helper.make_tensor_value_info(ranges[1], TensorProto.INT64, [None]))
        return ranges


class Values(Tap):
    """The numbers themselves, counted as they come.

    Args:
        folder: the bundle.
        file: the graph's file in it.
        histograms: what counts the numbers of each value.
    """

    def __init__(self, folder: Path, file: str, histograms: Mapping[str, Histogram]) -> None:
        super().__init__(folder, file, list(histograms))
        self.histograms = histograms

    def report(self, found: list[NumpyArray]) -> None:
        """Count the numbers of one run, and let go of each value's before the next."""
        for histogram in self.histograms.values():
            histogram.add(found.pop(0))

    def _add(self, graph: onnx.GraphProto) -> list[str]:
        return _let_out(graph, self.values)


class Moments(Tap):
    """Sums over all but the last axis of each value, and over all runs.

    Attributes:
        moments: of each value [..., n] the sums [3, n] of 1, of it and of its square; empty
            until it was computed once.
    """

    def __init__(self, folder: Path, file: str, values: Sequence[str]) -> None:
        super().__init__(folder, file, values)
        self.moments = [np.zeros((0, 0)) for _ in values]

    def report(self, found: list[NumpyArray]) -> None:
        """Add the sums of one run."""
        for number, value in enumerate(found):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
            sums = np.stack([np.full(rows.shape[1], len(rows)), rows.sum(0), (rows**2).sum(0)])
            known = self.moments[number]
            self.moments[number] = known + sums if known.size else sums

    def _add(self, graph: onnx.GraphProto) -> list[str]:
        return _let_out(graph, self.values)


class Snapshot(Tap):
    """The values themselves, of any type, as the last run made them.

    Attributes:
        found: by name.
    """

    def __init__(self, folder: Path, file: str, values: Sequence[str]) -> None:
        super().__init__(folder, file, values)
        self.found: dict[str, NumpyArray] = {}

    def report(self, found: list[NumpyArray]) -> None:
        """Keep the values of one run."""
        self.found = dict(zip(self.values, found, strict=True))

    def _add(self, graph: onnx.GraphProto) -> list[str]:
        names = _let_out(graph, self.values)
        for output in graph.output:
            if output.name.startswith(_TAP):
                output.ClearField("type")  # the runtime knows
        return names


def _let_out(graph: onnx.GraphProto, values: Sequence[str]) -> list[str]:
    """Make values outputs; return their names as such."""

    # A value that is an output, or an input, already needs another name.
    def tap(number: int, value: str) -> list[onnx.NodeProto]:
        return [helper.make_node("Identity", [value], [f"{_TAP}{number}"])]

    _insert(graph, values, tap)
    names = [f"{_TAP}{number}" for number in range(len(values))]
    for name in names:
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return names


def _insert(
    graph: onnx.GraphProto,
    values: Sequence[str],
    tap: Callable[[int, str], list[onnx.NodeProto]],
) -> None:
    """Insert what reads a value right behind the node that makes it.

    There the runtime runs it at once (`_session`) and can free the value; at the end of the
    graph every value would live until then.
    """
    waiting = {name: number for number, name in enumerate(values)}
    nodes: list[onnx.NodeProto] = []
    for name in [value.name for value in graph.input]:
        if name in waiting:
            nodes += tap(waiting.pop(name), name)
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            if name in waiting:
                nodes += tap(waiting.pop(name), name)
    if waiting:
        raise InternalError(f"the graph has no value {next(iter(waiting))!r}")
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _session(proto: onnx.ModelProto, folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = usable_cpus()
    options.enable_mem_pattern = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # In the order of the graph. By default all taps run last: measured on 60 values of 8 MB,
    # 490 MB were held at once instead of 1.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    try:
        return onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ort_errors() as error:
        raise BundleError(
            f"a graph of {folder} does not load in ONNX Runtime {onnxruntime.__version__}: "
            f"{error}",
            fix="calibrate an engine that runs on the CPU provider",
        ) from error
