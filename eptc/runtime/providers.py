"""Execution providers: which can start on this machine, which an engine asks for.

`onnxruntime.get_available_providers()` lists what the package was built with. A provider whose
driver or libraries are missing is asked to start all the same, prints to stderr and is dropped;
`why_not` finds that out beforehand, in silence, and then starts it once to be sure.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from eptc.errors import OptionError
from eptc.runtime.ort_errors import ort_errors

__all__ = ["Provider", "Request", "choose", "probe_providers", "why_not"]

Provider = str | tuple[str, Mapping[str, Any]]
Request = tuple[str, dict[str, Any]]

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"

_DEFAULT_ORDER: Final = (TENSORRT, CUDA, CPU)
_SHORT: Final = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
_ON_CUDA: Final = (TENSORRT, CUDA)
# From ONNX Runtime's documentation; not measured. TF32 is on by default there and keeps 10 bits of
# a float32's mantissa: an engine that was verified in float32 would answer otherwise on a GPU.
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {CUDA: {"use_tf32": "0"}}
_TENSORRT_MAJORS: Final = (10, 11, 12)

# The ONNX model y = Identity(x), opset 13: something to start a provider with.
_IDENTITY: Final = (
    b'\x08\x08:9\n\x12\n\x01x\x12\x01y"\x08Identity:\x00\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

_lock = threading.Lock()


def choose(providers: Sequence[Provider] | None) -> list[Request]:
    """Return the providers to ask for, with options, in order of preference.

    Args:
        providers: names (`cuda` or `CUDAExecutionProvider`), or pairs of name and options.
            None: TensorRT, CUDA, CPU, those of them that can start.

    Raises:
        OptionError: a provider that is not known or cannot start; what can is named.
    """
    if providers is None:
        return [_request(name) for name in _DEFAULT_ORDER if why_not(name) is None]
    if isinstance(providers, str) or not providers:
        raise OptionError(
            f"providers is {providers!r}",
            expected="a list of names",
            fix=f"providers=[{(providers or 'cpu')!r}], or None to let the engine choose",
        )
    requests = [_request(provider) for provider in providers]
    for name, _ in requests:
        if reason := why_not(name):
            raise OptionError(
                f"{name} cannot start: {reason}", expected=f"what starts here: {_startable()}"
            )
    return requests


def probe_providers() -> dict[str, str | None]:
    """Return every provider ONNX Runtime was built with, and why it cannot start or None."""
    return {name: why_not(name) for name in _built_in()}


def why_not(name: str) -> str | None:
    """Return why a provider cannot start here, or None where it does."""
    if name not in _built_in():
        return "this ONNX Runtime was built without it"
    if name not in _ON_CUDA:
        return None
    with _lock:
        return (
            _no_cuda() or (_no_tensorrt() if name == TENSORRT else None) or _does_not_start(name)
        )


def _request(provider: Provider) -> Request:
    name, options = provider if isinstance(provider, tuple) else (provider, {})
    if not isinstance(name, str):
        raise OptionError(f"a provider is {name!r}", expected="a name such as cpu or cuda")
    full = _SHORT.get(name.lower(), name)
    return full, {**_OPTIONS.get(full, {}), **options}


def _built_in() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _startable() -> str:
    return ", ".join(name for name, reason in probe_providers().items() if reason is None)


@functools.cache
def _no_cuda() -> str | None:
    """Return why CUDA cannot start: no driver, no device, or libraries that do not load."""
    driver_name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(driver_name)
    except OSError:
        return f"there is no NVIDIA driver ({driver_name})"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return "the NVIDIA driver does not start"
    if count.value == 0:
        return "there is no NVIDIA device"
    return _no_cuda_libraries()


def _no_cuda_libraries() -> str | None:
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):  # older than 1.21: the session will tell
        return None
    # It finds the libraries of the nvidia-* wheels, and prints what it does not find.
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    failures = [line for line in printed.getvalue().splitlines() if "Failed to load" in line]
    return failures[0].strip() if failures else None


@functools.cache
def _no_tensorrt() -> str | None:
    for major in _TENSORRT_MAJORS:
        name = f"nvinfer_{major}.dll" if sys.platform == "win32" else f"libnvinfer.so.{major}"
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return None
    return "the TensorRT libraries (nvinfer) are not found"


@functools.cache
def _does_not_start(name: str) -> str | None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is returned
    try:
        session = onnxruntime.InferenceSession(
            _IDENTITY, options, providers=[name], enable_fallback=0
        )
    except ort_errors() as error:
        return str(error)
    return None if name in session.get_providers() else "ONNX Runtime goes on without it"
