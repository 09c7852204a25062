"""Built engines, loaded: the bundle's engine with TensorRT in the place of ONNX Runtime.

For proving engines and for trying them: inputs and outputs lie in the host's memory between two
steps. Written against TensorRT's documentation; never run on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eptc.errors import BundleError, InputError, MissingExtraError
from eptc.files import sha256
from eptc.runtime import Engine
from eptc.runtime.graph import DTYPE_OF_ORT, Graph, NumpyArray, element_type
from eptc.runtime.loading import open_tokenizer
from eptc.runtime.manifest import load_manifest
from eptc.runtime.row_tasks import check_task_ids
from eptc.runtime.spec import TASK_IDS, GraphSpec, TensorSpec
from eptc.tasks import Task
from eptc.tensorrt.build_engine import BuildError, machine, package
from eptc.tensorrt.cuda import Device, Memory
from eptc.tensorrt.record import Here, read_record

__all__ = ["Session", "here", "load"]

_ORT = {dtype: name for name, dtype in DTYPE_OF_ORT.items()}
_TENSORRT = {
    "bfloat16": "BF16", "bool": "BOOL", "float16": "HALF", "float32": "FLOAT", "int32": "INT32",
    "int64": "INT64",
}  # fmt: skip


def here(device: int = 0) -> Here:
    """Return what there is to run engines.

    Raises:
        MissingExtraError: the package tensorrt is not installed, or too old.
        InputError: there is no NVIDIA driver or no GPU.
    """
    try:
        trt = package()
    except BuildError as error:
        raise MissingExtraError(
            str(error), expected="the version that built the engines", fix="pip install tensorrt"
        ) from error
    try:
        found = machine(device)
    except BuildError as error:
        raise InputError(str(error), expected="an NVIDIA driver and a GPU") from error
    return Here(trt.__version__, **found)


def load(directory: str | Path, device: int = 0) -> Engine:
    """Load the engines that were built of a bundle.

    Args:
        directory: the bundle's folder, with engines and `engines.json` in it.
        device: number of the GPU.

    Returns:
        An engine that answers as any other; a batch has to fit the shapes it was built for.

    Raises:
        BundleError: no engines, or ones of another TensorRT, GPU, driver or graph.
        MissingExtraError: the package tensorrt is not installed.
        InputError: there is no NVIDIA driver or no GPU.
    """
    folder = Path(directory)
    manifest = load_manifest(folder)
    built = read_record(folder)
    built.check(here(device))
    digests = {role: sha256(folder / graph.file) for role, graph in manifest.graphs.items()}
    files, gpu = built.check_files(folder, digests), Device(device)
    graphs = {
        role: Graph(role, spec, Session(files[role], spec, gpu, manifest.tasks))
        for role, spec in manifest.graphs.items()
    }
    return Engine(folder, manifest, graphs, open_tokenizer(folder, manifest))


@dataclasses.dataclass(frozen=True)
class _Node:
    """What ONNX Runtime says of an input or output."""

    name: str
    type: str
    shape: list[int | str]


class Session:
    """An engine, asked as a session of ONNX Runtime is.

    Args:
        path: the serialized engine.
        spec: the graph's interface.
        device: the GPU.
        tasks: those that rows may name; none where they name none.

    Raises:
        BundleError: TensorRT cannot read it, or its interface is another one.
    """

    def __init__(self, path: Path, spec: GraphSpec, device: Device, tasks: Sequence[Task]) -> None:
        import tensorrt as trt

        self._spec, self._device, self._tasks = spec, device, tasks
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BundleError(
                f"TensorRT {trt.__version__} cannot read {path}",
                fix="run build_engine.py of the bundle here",
            )
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        for tensor in (*spec.inputs, *spec.outputs):
            kind = getattr(trt.DataType, _TENSORRT[tensor.dtype])
            if tensor.name not in names or self._engine.get_tensor_dtype(tensor.name) != kind:
                raise BundleError(f"{path} has no {tensor.name} of type {tensor.dtype}")
        # One context: one batch at a time.
        self._context, self._lock = self._engine.create_execution_context(), threading.Lock()

    def get_inputs(self) -> list[_Node]:
        """Return the inputs."""
        return _nodes(self._spec.inputs)

    def get_outputs(self) -> list[_Node]:
        """Return the outputs."""
        return _nodes(self._spec.outputs)

    def get_providers(self) -> list[str]:
        """Return what runs it."""
        return ["TensorRT"]

    def io_binding(self) -> _Binding:
        """Return what holds inputs and outputs of one run."""
        return _Binding()

    def run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[NumpyArray]:
        """Run on arrays; return those outputs.

        Raises:
            InputError: shapes that the engine was not built for, or the place of no task.
        """
        found = self._run(feeds)
        return [found[name].numpy() for name in names]

    def run_with_iobinding(self, binding: _Binding) -> None:
        """Run on what is bound."""
        found = self._run(binding.inputs)
        binding.outputs = [found[name] for name in binding.names]

    def _run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if TASK_IDS in feeds:
            # TensorRT's Gather refuses no place.
            check_task_ids(np.asarray(feeds[TASK_IDS]), self._tasks)
        with self._lock, self._device.memory() as memory:
            self._device.use()
            kept = [self._feed(memory, tensor, feeds[tensor.name]) for tensor in self._spec.inputs]
            outputs = {tensor.name: self._output(memory, tensor) for tensor in self._spec.outputs}
            if not self._context.execute_async_v3(self._device.stream):
                raise InputError(
                    "TensorRT cannot run the engine on these inputs: its log says why"
                )
            self._device.wait()
            del kept  # until here the copies read from it
            for value, address in outputs.values():
                memory.get(address, value.data_ptr(), _bytes(value))
        return {name: value for name, (value, _) in outputs.items()}

    def _feed(self, memory: Memory, tensor: TensorSpec, value: Any) -> Any:
        import onnxruntime

        if isinstance(value, np.ndarray):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        shape = tuple(value.shape())
        low, _, high = map(tuple, self._engine.get_tensor_profile_shape(tensor.name, 0))
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            raise InputError(
                f"{tensor.name} has the shape {list(shape)}, which the engine was not built for",
                expected=f"{list(low)} to {list(high)}",
                fix="send smaller batches or shorter texts, or export with a larger --profile",
            )
        self._context.set_input_shape(tensor.name, shape)
        address = memory.put(value.data_ptr(), _bytes(value))
        self._context.set_tensor_address(tensor.name, address)
        return value

    def _output(self, memory: Memory, tensor: TensorSpec) -> tuple[Any, int]:
        import onnxruntime

        shape = list(self._context.get_tensor_shape(tensor.name))
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, element_type(tensor.dtype)
        )
        address = memory.take(_bytes(value))
        self._context.set_tensor_address(tensor.name, address)
        return value, address


class _Binding:
    """Inputs and outputs of one run, in the host's memory."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.names: list[str] = []
        self.outputs: list[Any] = []

    def bind_cpu_input(self, name: str, value: NumpyArray) -> None:
        self.inputs[name] = value

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_output(self, name: str, *_: Any) -> None:
        self.names.append(name)

    def get_outputs(self) -> list[Any]:
        return self.outputs


def _nodes(tensors: Sequence[TensorSpec]) -> list[_Node]:
    return [_Node(tensor.name, _ORT[tensor.dtype], list(tensor.shape)) for tensor in tensors]


def _bytes(value: Any) -> int:
    return int(value.tensor_size_in_bytes())
