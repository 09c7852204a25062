"""The few calls of the CUDA driver that running an engine takes.

Written against the documentation of the driver's API; never run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from eptc.errors import OptionError

__all__ = ["Device"]

_Pointer = ctypes.c_uint64


class Device:
    """One GPU, its primary context and a stream: what TensorRT uses in the same process.

    Args:
        number: of the GPU.

    Raises:
        OptionError: no driver or no such GPU.
    """

    def __init__(self, number: int = 0) -> None:
        try:
            self._cuda: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise OptionError(
                f"there is no NVIDIA driver: {error}", expected="libcuda.so.1"
            ) from error
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        device = ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.use()
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)

    @property
    def stream(self) -> int:
        """Handle of the stream; it waits for copies, which go by the default stream."""
        return self._stream.value or 0

    def use(self) -> None:
        """Make the GPU the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    @contextlib.contextmanager
    def memory(self) -> Iterator[Memory]:
        """Yield what takes memory, all of which is freed at the end."""
        memory = Memory(self)
        try:
            yield memory
        finally:
            memory.free()

    def wait(self) -> None:
        """Wait for what the stream was given."""
        self._call("cuStreamSynchronize", self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise OptionError(f"the GPU cannot be used: {name} gives CUDA error {code}")


class Memory:
    """Memory of a GPU."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._taken: list[_Pointer] = []

    def take(self, size: int) -> int:
        """Return the address of new memory; even what is empty has one of its own."""
        pointer = _Pointer()
        self._device._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        self._taken.append(pointer)
        return pointer.value

    def put(self, source: int, size: int) -> int:
        """Copy bytes of the host to new memory; return its address."""
        address = self.take(size)
        if size:
            self._device._call(
                "cuMemcpyHtoD_v2",
                _Pointer(address),
                ctypes.c_void_p(source),
                ctypes.c_size_t(size),
            )
        return address

    def get(self, address: int, target: int, size: int) -> None:
        """Copy bytes to the host."""
        if size:
            self._device._call(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(target),
                _Pointer(address),
                ctypes.c_size_t(size),
            )

    def free(self) -> None:
        """Give everything back."""
        for pointer in self._taken:
            self._device._call("cuMemFree_v2", pointer)
        self._taken.clear()
