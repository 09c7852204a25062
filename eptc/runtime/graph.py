"""One ONNX graph of a bundle in an ONNX Runtime session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from eptc.errors import BundleError, EptcError, InputError, OptionError
from eptc.runtime.ort_errors import ort_errors
from eptc.runtime.providers import CPU, CUDA, TENSORRT, Request

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from eptc.runtime.spec import GraphSpec, TensorSpec

__all__ = ["Graph", "NumpyArray", "open_session", "signature"]

NumpyArray = np.ndarray[Any, Any]

_DTYPE_OF_ORT: Final = {
    "tensor(bfloat16)": "bfloat16",
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}
_BFLOAT16: Final = 16  # its number in onnx.TensorProto.DataType; numpy has no such type
_FATAL: Final = 4  # ONNX Runtime's errors are raised; its log would only say them twice


class Graph:
    """A session with the graph's declared interface; safe to run from several threads.

    Args:
        name: its role in the bundle (`model`, `encoder`, `decoder`).
        spec: what the manifest declares.
        path: the `.onnx` file.
        requests: providers in order of preference.
        threads: threads one operator may use.

    Raises:
        BundleError: a graph that does not load or differs from the manifest.
        OptionError: a provider that was asked for did not start.
    """

    def __init__(
        self, name: str, spec: GraphSpec, path: Path, requests: Sequence[Request], threads: int
    ) -> None:
        self.name = name
        self.spec = spec
        self.inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._session = open_session(path, requests, threads)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if difference := signature(self._session, spec):
            raise BundleError(f"graph {name!r} differs from the manifest: {difference}")
        started = next(iter(self.providers), CPU)
        on_cuda = started in (CUDA, TENSORRT)
        options = next((given for asked, given in requests if asked == started), {})
        self._device = ("cuda", int(options.get("device_id", 0))) if on_cuda else ("cpu", 0)

    def run(self, feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        """Run on arrays that fit the interface and return every output.

        Raises:
            InputError: ONNX Runtime refuses the values.
        """
        names = [tensor.name for tensor in self.spec.outputs]
        try:
            values = self._session.run(names, dict(feeds))
        except ort_errors() as error:
            raise self._refused(error) from error
        return dict(zip(names, values, strict=True))

    def run_bound(self, feeds: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
        """Run on arrays and OrtValues; return OrtValues, the `present.*` ones on the device.

        What one step caches is the next step's input without a copy or a conversion.

        Args:
            feeds: a value per input.
            without: outputs nobody reads, which then never leave the device.
        """
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        names = [tensor.name for tensor in self.spec.outputs if tensor.name not in without]
        for name in names:
            device = self._device if name.startswith("present.") else ("cpu", 0)
            binding.bind_output(name, *device)
        try:
            self._session.run_with_iobinding(binding)
        except ort_errors() as error:
            raise self._refused(error) from error
        return dict(zip(names, binding.get_outputs(), strict=True))

    def empty(self, name: str, batch: int) -> Any:
        """Return an OrtValue without elements for a cache input: past length 0."""
        import onnxruntime

        spec = self.inputs[name]
        shape = [dim if isinstance(dim, int) else 0 for dim in spec.shape]
        shape[0] = batch
        element = _BFLOAT16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).type
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element)

    def _refused(self, error: Exception) -> EptcError:
        return InputError(f"ONNX Runtime cannot run graph {self.name!r} on these inputs: {error}")


def open_session(
    path: Path, requests: Sequence[Request], threads: int, *, optimize: bool = True
) -> Any:
    """Open a session.

    Raises:
        BundleError: the graph or its weights cannot be loaded.
        OptionError: the first provider asked for did not start.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        # Its own fallback prints to stdout and goes on with less than was asked for.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(requests), enable_fallback=0
        )
    except ort_errors() as error:
        raise BundleError(
            f"{path} does not load in ONNX Runtime {onnxruntime.__version__}: {error}",
            fix="check the bundle with `eptc verify`, or upgrade onnxruntime",
        ) from error
    missing = [name for name, _ in requests if name not in session.get_providers()]
    if missing:
        raise OptionError(
            f"{missing[0]} did not start",
            expected=f"what did: {', '.join(session.get_providers())}",
            fix="look at ONNX Runtime's log, or ask for fewer providers",
        )
    return session


def signature(session: Any, spec: GraphSpec) -> str | None:
    """Return the first difference between a session's interface and the declared one."""
    for side, nodes, declared in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        found = [(node.name, _DTYPE_OF_ORT.get(node.type, node.type)) for node in nodes]
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
