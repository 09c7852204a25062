"""One ONNX graph of a bundle in an ONNX Runtime session."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from eptc.errors import BundleError, EptcError, InputError
from eptc.runtime.ort_errors import ort_errors
from eptc.runtime.providers import CUDA, TENSORRT
from eptc.runtime.spec import TASK_IDS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from eptc.runtime.spec import GraphSpec, TensorSpec

__all__ = ["DTYPE_OF_ORT", "Graph", "NumpyArray", "element_type", "signature"]

NumpyArray = np.ndarray[Any, Any]

DTYPE_OF_ORT: Final = {
    "tensor(bfloat16)": "bfloat16",
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}
_UNCAPTURED: Final = "-1"
_BFLOAT16: Final = 16  # its number in onnx.TensorProto.DataType; numpy has no such type


class Graph:
    """A session with the graph's declared interface; safe to run from several threads.

    Args:
        name: its role in the bundle (`model`, `encoder`, `decoder`).
        spec: what the manifest declares.
        session: an open ONNX Runtime session.

    Raises:
        BundleError: the session's interface differs from the manifest.
    """

    def __init__(self, name: str, spec: GraphSpec, session: Any) -> None:
        if difference := signature(session, spec):
            raise BundleError(f"graph {name!r} differs from the manifest: {difference}")
        self.name = name
        self.spec = spec
        self.inputs = {tensor.name: tensor for tensor in spec.inputs}
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        self._session = session
        self._fixed: dict[str, Any] = {}
        self._shared: Graph | None = None
        self._process = os.getpid()
        self._place: int | None = None
        self.device = ("cpu", 0)
        self.captures = False
        if (started := self.providers[0]) in (CUDA, TENSORRT):
            options = session.get_provider_options()[started]
            self.device = ("cuda", int(options.get("device_id", 0)))
            self.captures = options.get("enable_cuda_graph", "0").lower() in ("1", "true")
        # A session that captures does so for every run that is not told otherwise, and may run
        # in one thread at a time.
        self._options = _run_options(_UNCAPTURED) if self.captures else None
        self._one_at_a_time = threading.Lock() if self.captures else contextlib.nullcontext()
        self._captured_ids = itertools.count(1)

    def with_fixed(self, arrays: Mapping[str, NumpyArray]) -> Graph:
        """Return the same session with optional inputs that every run is given besides.

        Args:
            arrays: by the inputs' names; copied to the device, once.
        """
        import onnxruntime

        found = copy.copy(self)
        found._fixed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array, *self.device)
            for name, array in arrays.items()
        }
        found._shared = self  # who opens it again finds this one while either is in use
        return found

    def of_task(self, place: int, spec: GraphSpec) -> Graph:
        """Return the graph, in the same session, as one whose rows are all of one task.

        Args:
            place: the task's.
            spec: the interface without the task, logits as wide as its head.
        """
        found = copy.copy(self)
        found.spec, found._place = spec, place
        found.inputs = {tensor.name: tensor for tensor in spec.inputs}
        return found

    @property
    def is_view(self) -> bool:
        """Whether it is the graph of several tasks seen as that of one (`of_task`)."""
        return self._place is not None

    def _fed(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        given = {**self._fixed, **feeds}
        if self._place is not None:
            given[TASK_IDS] = np.full(len(feeds["input_ids"]), self._place, np.int64)
        return given

    def _own(self, tensor: TensorSpec, value: NumpyArray) -> NumpyArray:
        """Return what of an output is the task's own: other heads may be wider."""
        width = tensor.shape[-1] if self._place is not None else None
        return value[..., :width] if isinstance(width, int) else value

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """Run on arrays that fit the interface and return every output.

        Raises:
            InputError: ONNX Runtime refuses the values.
        """
        self.check_process()
        names = [tensor.name for tensor in self.spec.outputs]
        try:
            with self._one_at_a_time:
                values = self._session.run(names, self._fed(feeds), self._options)
        except ort_errors() as error:
            raise self._refused(error) from error
        return {
            tensor.name: self._own(tensor, value)
            for tensor, value in zip(self.spec.outputs, values, strict=True)
        }

    def run_bound(
        self, feeds: Mapping[str, Any], without: Collection[str] = (), *, stay: bool = False
    ) -> dict[str, Any]:
        """Run on arrays and OrtValues; return OrtValues, the `present.*` ones on the device.

        What one step caches is the next step's input without a copy or a conversion.

        Args:
            feeds: a value per input.
            without: outputs nobody reads, which then never leave the device.
            stay: whether every output stays on the device.
        """
        self.check_process()
        binding = self._session.io_binding()
        for name, value in self._fed(feeds).items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        names = [tensor.name for tensor in self.spec.outputs if tensor.name not in without]
        for name in names:
            device = self.device if stay or name.startswith("present.") else ("cpu", 0)
            binding.bind_output(name, *device)
        try:
            with self._one_at_a_time:
                self._session.run_with_iobinding(binding, self._options)
        except ort_errors() as error:
            raise self._refused(error) from error
        return dict(zip(names, binding.get_outputs(), strict=True))

    def bound_to(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> Callable[[], None]:
        """Return what runs the graph on the same OrtValues each time.

        Where the session captures, the first call does, and later ones replay what it captured.

        Args:
            inputs: a value per input, on the device.
            outputs: likewise, to be written.
        """
        binding = self._session.io_binding()
        for name, value in {**self._fixed, **inputs}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = _run_options(str(next(self._captured_ids))) if self.captures else None

        def run() -> None:
            self.check_process()
            try:
                with self._one_at_a_time:
                    self._session.run_with_iobinding(binding, options)
            except ort_errors() as error:
                raise self._refused(error) from error

        return run

    def empty(self, name: str, batch: int) -> Any:
        """Return an OrtValue without elements for a cache input: past length 0."""
        import onnxruntime

        spec = self.inputs[name]
        shape = [dim if isinstance(dim, int) else 0 for dim in spec.shape]
        shape[0] = batch
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type(spec.dtype))

    def check_process(self) -> None:
        """Refuse to run in a child: the session's threads and locks stayed with the parent."""
        if os.getpid() != self._process:
            raise InputError(
                "the engine was loaded before this process was forked",
                fix="load it in the child, or start the child by spawn",
            )

    def _refused(self, error: Exception) -> EptcError:
        return InputError(f"ONNX Runtime cannot run graph {self.name!r} on these inputs: {error}")


def element_type(dtype: str) -> Any:
    """Return what ONNX Runtime calls a type of elements."""
    return _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type


def _run_options(captured: str) -> Any:
    """Return the options of a run that is captured under a number, or of one that is not."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", captured)
    return options


def signature(session: Any, spec: GraphSpec) -> str | None:
    """Return the first difference between a session's interface and the declared one."""
    for side, nodes, declared in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        found = [(node.name, DTYPE_OF_ORT.get(node.type, node.type)) for node in nodes]
        wanted = [(tensor.name, tensor.dtype) for tensor in declared]
        if found != wanted:
            pair = next(
                (pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), None
            )
            what = (
                f"{pair[0]} instead of {pair[1]}" if pair else f"{len(found)}, not {len(wanted)}"
            )
            return f"{side}: {what}"
        for node, tensor in zip(nodes, declared, strict=True):
            if reason := _shape_difference(node.shape, tensor):
                return reason
    return None


def _shape_difference(shape: Sequence[int | str | None], tensor: TensorSpec) -> str | None:
    same_rank = len(shape) == len(tensor.shape)
    if same_rank and all(
        wanted == found or not (isinstance(wanted, int) and isinstance(found, int))
        for found, wanted in zip(shape, tensor.shape, strict=True)
    ):
        return None
    return f"{tensor.name} has shape {list(shape)} instead of {list(tensor.shape)}"
