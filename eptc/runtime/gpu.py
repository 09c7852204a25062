"""What NVIDIA's driver and libraries say about this machine, asked through ctypes.

Written against the documentation of the CUDA driver, NVML and TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, Final

from eptc.errors import InternalError

__all__ = [
    "Device",
    "Driver",
    "built_for_tensorrt",
    "dotted",
    "find_driver",
    "load_tensorrt",
    "tensorrt_version",
    "wait_for_device",
]

_WINDOWS: Final = sys.platform == "win32"
_DRIVER: Final = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
_MANAGEMENT: Final = "nvml.dll" if _WINDOWS else "libnvidia-ml.so.1"
# CUdevice_attribute of the driver's API.
_COMPUTE_MAJOR: Final = 75
_COMPUTE_MINOR: Final = 76
_NEWEST_TENSORRT: Final = 12
_OLDEST_TENSORRT: Final = 8


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU.

    Args:
        name: as the driver says it, `NVIDIA A10G`.
        compute_capability: `8.6`.
        memory: bytes.
    """

    name: str
    compute_capability: str
    memory: int


@dataclasses.dataclass(frozen=True)
class Driver:
    """The driver that is installed.

    Args:
        version: its own version, `570.86.10`; None where nobody says.
        cuda: the newest CUDA it runs, `12.8`.
        devices: its GPUs, by their numbers.
    """

    version: str | None
    cuda: str
    devices: tuple[Device, ...]


@functools.cache
def find_driver() -> Driver | str:
    """Return the driver and its devices, or why there is none that works."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({_DRIVER})"
    if failure := driver.cuInit(0):
        return f"the NVIDIA driver does not start: {_error(driver, failure)}"
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    if failure := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not start: {_error(driver, failure)}"
    if count.value == 0:
        return "there is no NVIDIA device"
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    devices = tuple(_device(driver, number) for number in range(count.value))
    return Driver(_driver_version(), cuda, devices)


def built_for_tensorrt(capi: Path) -> int | None:
    """Return the major version of TensorRT that ONNX Runtime's provider is linked to.

    Args:
        capi: the folder of ONNX Runtime's libraries.
    """
    name = (
        "onnxruntime_providers_tensorrt.dll"
        if _WINDOWS
        else "libonnxruntime_providers_tensorrt.so"
    )
    try:
        library = (capi / name).read_bytes()
    except OSError:
        return None
    found = re.search(rb"nvinfer_(\d+)\.dll" if _WINDOWS else rb"libnvinfer\.so\.(\d+)", library)
    return int(found[1]) if found else None


def load_tensorrt(major: int | None) -> str | None:
    """Load TensorRT's libraries, the wheel's or the system's; return why that fails or None.

    Args:
        major: the major version that is needed; None: any.
    """
    majors = range(_NEWEST_TENSORRT, _OLDEST_TENSORRT - 1, -1)
    if major is None:
        fits = any(_library(other) for other in majors)
        return None if fits else "the TensorRT libraries (nvinfer) are not found"
    if _library(major) is not None:
        for name in ("nvinfer_plugin", "nvonnxparser"):  # what the provider is linked to besides
            _load(_file(name, major))
        return None
    others = [str(other) for other in majors if other != major and _library(other)]
    if others:
        return f"it is built for TensorRT {major}, and what is installed is TensorRT {others[0]}"
    return f"the libraries of TensorRT {major} ({_file('nvinfer', major)}) are not found"


def tensorrt_version(major: int | None) -> str | None:
    """Return the version of the TensorRT that is installed, `10.9.0`; None where there is none.

    Args:
        major: the major version that is used; None: the newest.
    """
    majors = range(_NEWEST_TENSORRT, _OLDEST_TENSORRT - 1, -1) if major is None else (major,)
    for each in majors:
        if (library := _library(each)) is not None:
            return dotted(int(library.getInferLibVersion()))
    return None


def dotted(version: int) -> str:
    """Return TensorRT's version number as text: 1000 a major and 100 a minor before 10.

    >>> dotted(100900), dotted(8601)
    ('10.9.0', '8.6.1')
    """
    large = version >= 100000
    major, rest = divmod(version, 10000 if large else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def wait_for_device(number: int) -> None:
    """Wait until a device has done what any stream of this process gave it.

    Args:
        number: of the device.

    Raises:
        InternalError: the driver refuses.
    """
    driver = ctypes.CDLL(_DRIVER)
    context, former = ctypes.c_void_p(), ctypes.c_void_p()
    # The primary context is the one that PyTorch, CuPy and ONNX Runtime work in.
    failure = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
    failure = failure or driver.cuCtxPushCurrent_v2(context)
    if not failure:
        failure = driver.cuCtxSynchronize()
        driver.cuCtxPopCurrent_v2(ctypes.byref(former))
        driver.cuDevicePrimaryCtxRelease_v2(number)
    if failure:
        raise InternalError(f"CUDA device {number} does not answer: {_error(driver, failure)}")


def _device(driver: Any, number: int) -> Device:
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), number)
    memory = ctypes.c_size_t(0)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), number)
    capability = []
    for attribute in (_COMPUTE_MAJOR, _COMPUTE_MINOR):
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, number)
        capability.append(str(value.value))
    return Device(name.value.decode(errors="replace"), ".".join(capability), memory.value)


def _error(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode(errors='replace')} ({code})"


def _driver_version() -> str | None:
    """Return the driver's version as its management library says it."""
    management = _load(_MANAGEMENT)
    if management is None or management.nvmlInit_v2() != 0:
        return None
    text = ctypes.create_string_buffer(96)
    failed = management.nvmlSystemGetDriverVersion(text, len(text))
    management.nvmlShutdown()
    return None if failed else text.value.decode(errors="replace")


@functools.cache
def _library(major: int) -> Any:
    return _load(_file("nvinfer", major))


def _file(name: str, major: int) -> str:
    return f"{name}_{major}.dll" if _WINDOWS else f"lib{name}.so.{major}"


def _load(file: str) -> Any:
    """Return a library of the system or of TensorRT's wheel; None where there is none."""
    found = importlib.util.find_spec("tensorrt_libs")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    for path in (file, *(str(Path(place) / file) for place in places)):
        # Visible to all: ONNX Runtime's provider finds what is loaded by its name.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return None
