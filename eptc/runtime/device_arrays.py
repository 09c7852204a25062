"""Arrays that stay on the engine's device: in and out by DLPack, without a copy.

A producer's array is shared, not copied: ONNX Runtime holds on to it while a run reads it. What
comes out owns its memory; an array that another library took over DLPack keeps that memory, also
when the engine is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from eptc.errors import InputError, OptionError
from eptc.runtime.feeds import check_given, check_shapes, check_values
from eptc.runtime.graph import DTYPE_OF_ORT
from eptc.runtime.ort_errors import ort_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eptc.runtime.graph import Graph, NumpyArray
    from eptc.runtime.spec import GraphSpec, TensorSpec
    from eptc.tasks import Task

__all__ = ["DeviceArray", "check_uncaptured", "check_whole", "on_device", "shared"]

# DLDeviceType of the DLPack standard.
_CPU: Final = 1
_CUDA: Final = 2
_CUDA_MANAGED: Final = 13
_REFUSALS: Final = (BufferError, RuntimeError, TypeError, ValueError)


class DeviceArray:
    """An array in ONNX Runtime's memory. `torch.from_dlpack(it)` shares it, and so do others.

    What it holds is complete: the run that wrote it has waited for the device, so any stream may
    read it at once.

    Args:
        value: ONNX Runtime's.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self._value.shape())

    @property
    def dtype(self) -> str:
        """The type of its elements, `float32`; `bfloat16` as well, which numpy does not have."""
        found: str = DTYPE_OF_ORT[self._value.data_type()]
        return found

    @property
    def device(self) -> str:
        """Where it is: `cpu`, or `cuda`."""
        name: str = self._value.device_name().lower()
        return name

    def numpy(self) -> NumpyArray:
        """Return it in the CPU's memory: a copy where it is on another device, else a view."""
        array: NumpyArray = self._value.numpy()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NumpyArray:
        """Let numpy read it."""
        array = self.numpy()
        return np.array(array, dtype=dtype, copy=bool(copy) or None)

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,  # we give the oldest form
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Share it with another library, as the array API standard says.

        Raises:
            BufferError: it is asked for on another device, or as a copy.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("a DeviceArray is shared where it is, and never copied")
        return self._value.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's number of the device's type, and the device's own."""
        kind, number = self._value.__dlpack_device__()
        return int(kind), int(number)

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {list(self.shape)} on {self.device}>"


def shared(
    feeds: Mapping[str, Any],
    name: str,
    spec: GraphSpec,
    device: tuple[str, int],
    vocab_size: int | None,
    tasks: Sequence[Task] = (),
) -> dict[str, Any]:
    """Return the feeds as ONNX Runtime's values that share the caller's memory.

    Args:
        feeds: per input an array that speaks DLPack, on the engine's device or in the CPU's
            memory, of the declared type.
        name: the graph's name, for messages.
        spec: its declared interface.
        device: the engine's, `cuda` or `cpu` and its number.
        vocab_size: token ids must be below it; None where unknown.
        tasks: of an engine of several, in their places.

    Raises:
        InputError: names, types, ranks or sizes that do not fit, an array of another device, and
            values as for `feeds.checked`, which are looked at in the CPU's memory alone.
    """
    check_given(feeds, name, spec)
    values = {tensor.name: _value(feeds[tensor.name], tensor, device) for tensor in spec.inputs}
    shapes = {key: tuple(value.shape()) for key, value in values.items()}
    check_shapes(shapes, spec)
    for tensor in spec.inputs:
        value = values[tensor.name]
        if value.device_name().lower() == "cpu" and tensor.dtype.startswith("int"):
            check_values(value.numpy(), tensor, vocab_size, tasks)
    return values


def check_whole(graph: Graph, method: str) -> None:
    """Refuse a view of one task: it cuts the answers, which stay on the device, on the CPU.

    Raises:
        OptionError: with what to call instead.
    """
    if graph.is_view:
        raise OptionError(
            f"{method} is called on one task of an engine of several",
            fix=f"call {method} on the engine itself, and give the rows' task_ids",
        )


def check_uncaptured(graph: Graph) -> None:
    """Refuse to leave arrays in the memory of a session that captures.

    A captured run writes its intermediate values where they were when it was captured. Between
    replays ONNX Runtime's arena takes that memory for free, and may give it to an output that
    the caller keeps.

    Raises:
        OptionError: with what to call instead.
    """
    if graph.captures:
        raise OptionError(
            "run_device is called on an engine that captures: a replay may write over its arrays",
            fix="call fixed, whose outputs have memory of their own, or load the engine without "
            "enable_cuda_graph",
        )


def on_device(feeds: Mapping[str, Any]) -> bool:
    """Whether one of the feeds is in the memory of a GPU."""
    return any(
        array.__dlpack_device__()[0] != _CPU
        for array in feeds.values()
        if hasattr(array, "__dlpack_device__")
    )


def _value(array: Any, tensor: TensorSpec, device: tuple[str, int]) -> Any:
    import onnxruntime

    from_dlpack = getattr(onnxruntime.OrtValue, "from_dlpack", None)
    if from_dlpack is None:
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} does not speak DLPack",
            fix="upgrade onnxruntime, or call run with numpy arrays",
        )
    if not hasattr(array, "__dlpack__"):
        raise InputError(
            f"{tensor.name!r} is a {type(array).__name__}",
            expected="an array that speaks DLPack (__dlpack__), such as a tensor of PyTorch",
        )
    if isinstance(array, np.ndarray):
        # numpy refuses to share what is read-only; ONNX Runtime only reads it.
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    else:
        _check_device(array, tensor, device)
        refusals: tuple[type[Exception], ...] = (*ort_errors(), *_REFUSALS)
        try:
            value = from_dlpack(array)
        except refusals as error:
            raise InputError(
                f"{tensor.name!r} cannot be shared by DLPack: {_why(error)}",
                expected=f"a contiguous {tensor.dtype} array that needs no gradient",
                fix="pass .contiguous(), and .detach() where it has a gradient",
            ) from error
    found = DTYPE_OF_ORT.get(value.data_type(), value.data_type())
    if found != tensor.dtype:
        raise InputError(
            f"{tensor.name!r} has dtype {found}",
            expected=f"{tensor.dtype}: arrays that are shared are not converted",
            fix=f"convert it first, in PyTorch .to(torch.{tensor.dtype})",
        )
    return value


def _why(error: Exception) -> str:
    """Return what an error says, without the place in ONNX Runtime's source that it was found."""
    said = str(error).rpartition(" was false. ")[2].strip().splitlines()
    return said[-1] if said else type(error).__name__


def _check_device(array: Any, tensor: TensorSpec, device: tuple[str, int]) -> None:
    kind, number = array.__dlpack_device__()
    if kind == _CPU:
        return
    if device[0] == "cuda" and kind in (_CUDA, _CUDA_MANAGED) and number == device[1]:
        return
    named = f"CUDA device {number}" if kind == _CUDA else f"DLPack's device ({kind}, {number})"
    where = f"CUDA device {device[1]}" if device[0] == "cuda" else "the CPU"
    raise InputError(
        f"{tensor.name!r} is on {named}, and the engine runs on {where}",
        expected=f"arrays on {where}" + (", or on the CPU" if device[0] == "cuda" else ""),
        fix="load the engine on that device: providers=[('cuda', {'device_id': '0'})], or move "
        "the array",
    )
