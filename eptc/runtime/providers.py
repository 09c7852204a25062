"""Execution providers: which can start on this machine, which an engine asks for.

`onnxruntime.get_available_providers()` lists what the package was built with. A provider whose
driver or libraries are missing is asked to start all the same, prints to stderr and is dropped;
`why_not` finds that out beforehand, in silence, and then starts it once to be sure.
"""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from eptc.errors import OptionError
from eptc.runtime.gpu import built_for_tensorrt, find_driver, load_tensorrt
from eptc.runtime.ort_errors import ort_errors

__all__ = [
    "Provider",
    "Request",
    "choose",
    "missing_library",
    "probe_providers",
    "tensorrt_major",
    "too_old",
    "why_not",
]

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

# The ONNX model y = Identity(x), opset 13: something to start a provider with.
_IDENTITY: Final = (
    b'\x08\x08:9\n\x12\n\x01x\x12\x01y"\x08Identity:\x00\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

_lock = threading.Lock()


def choose(providers: Sequence[Provider] | None, *, for_tensorrt: bool = False) -> list[Request]:
    """Return the providers to ask for, with options, in order of preference.

    Args:
        providers: names (`cuda` or `CUDAExecutionProvider`), or pairs of name and options.
            None: CUDA, CPU, those of them that can start.
        for_tensorrt: whether the bundle was made for TensorRT, which then comes before CUDA by
            itself. For others it has to be named: it builds an engine, for minutes, whenever a
            shape comes that it was not told of, and computes float32 in TF32.

    Raises:
        OptionError: a provider that is not known or cannot start; what can is named.
    """
    if providers is None:
        names = _DEFAULT_ORDER if for_tensorrt else _DEFAULT_ORDER[1:]
        return [_request(name) for name in names if why_not(name) is None]
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
    driver = find_driver()
    if isinstance(driver, str):
        return driver
    import onnxruntime

    needed = getattr(onnxruntime, "cuda_version", "")
    return too_old(driver.cuda, needed, driver.version) or _no_cuda_libraries(needed)


def too_old(runs: str, needed: str, driver: str | None) -> str | None:
    """Return why a driver does not run what ONNX Runtime was built with, or None.

    A driver runs every minor version of the major one it knows.

    Args:
        runs: the newest CUDA the driver runs, `12.8`.
        needed: the CUDA that ONNX Runtime was built with; empty where it does not say.
        driver: the driver's own version, for the message.
    """
    major = needed.partition(".")[0]
    if not major or int(major) <= int(runs.partition(".")[0]):
        return None
    named = f"the NVIDIA driver {driver}" if driver else "the NVIDIA driver"
    return (
        f"{named} runs CUDA up to {runs}, and this ONNX Runtime is built for CUDA {needed}: "
        "install a newer driver"
    )


def _no_cuda_libraries(needed: str) -> str | None:
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):  # older than 1.21: the session will tell
        return None
    # It finds the libraries of the nvidia-* wheels, and prints what it does not find.
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    return missing_library(printed.getvalue(), needed)


def missing_library(printed: str, needed: str) -> str | None:
    """Return which libraries of CUDA did not load and what would bring them, or None.

    Args:
        printed: what ONNX Runtime said when it tried.
        needed: the CUDA that it was built with; empty where it does not say.
    """
    failures = [line for line in printed.splitlines() if "Failed to load" in line]
    if not failures:
        return None
    extra = "" if len(failures) == 1 else f", and {len(failures) - 1} more"
    version = f"CUDA {needed} and cuDNN 9" if needed else "its CUDA and cuDNN"
    return (
        f"{failures[0].strip()}{extra}: install {version}, for instance with "
        "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


@functools.cache
def _no_tensorrt() -> str | None:
    return load_tensorrt(tensorrt_major())


@functools.cache
def tensorrt_major() -> int | None:
    """Return the major version of TensorRT that ONNX Runtime is built for; None if unknown."""
    import onnxruntime

    return built_for_tensorrt(Path(onnxruntime.__file__).parent / "capi")


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
