"""`eptc doctor`: what is installed, what really starts, what each target would need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from eptc.errors import InputError, PluginError
from eptc.plugins import Group, Plugin, find_plugin, installed

__all__ = ["doctor"]

_PACKAGES = (
    "ept-compiler", "numpy", "onnxruntime-gpu", "onnxruntime", "tokenizers", "torch",
    "transformers", "onnx", "onnx-ir", "onnxscript", "optimum", "safetensors", "sentencepiece",
    "jsonschema", "ml_dtypes", "tensorrt",
)  # fmt: skip
_COMPILER = ("jsonschema", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "safetensors",
             "sentencepiece", "torch", "transformers")  # fmt: skip


def doctor() -> dict[str, dict[str, Any]]:
    """Return versions, execution providers, GPUs and targets, each as name to finding.

    A provider is listed as it really starts on this machine, not as the package was built.
    """
    from eptc.runtime import probe_providers

    missing = [name for name in _COMPILER if importlib.util.find_spec(name) is None]
    return {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": len(os.sched_getaffinity(0)),
        },
        "packages": {name: _version(name) for name in _PACKAGES},
        "providers": {
            name: "starts" if reason is None else f"does not start: {reason}"
            for name, reason in probe_providers().items()
        },
        "gpu": _gpu(),
        "targets": {**_targets(missing), **_plugins("eptc.targets", missing)},
        "readers": _plugins("eptc.readers", missing),
        "passes": _plugins("eptc.passes", missing),
    }


def _gpu() -> dict[str, str]:
    """Return the driver, the GPUs and the libraries, and what ONNX Runtime was built for."""
    import onnxruntime

    from eptc.runtime.gpu import find_driver, tensorrt_version
    from eptc.runtime.providers import tensorrt_major

    major = tensorrt_major()
    built = f"CUDA {getattr(onnxruntime, 'cuda_version', '') or 'unknown'}"
    found = {
        "onnxruntime is built for": built + (f", TensorRT {major}" if major else ""),
        "tensorrt": tensorrt_version(None) or "not found: pip install tensorrt",
    }
    driver = find_driver()
    if isinstance(driver, str):
        return {"driver": driver, **found}
    devices = {
        f"device {number}": f"{device.name}, compute capability {device.compute_capability}, "
        f"{device.memory / 2**30:.0f} GiB"
        for number, device in enumerate(driver.devices)
    }
    version = driver.version or "version unknown"
    return {"driver": f"{version}, runs CUDA up to {driver.cuda}", **devices, **found}


def _targets(missing: Sequence[str]) -> dict[str, str]:
    """Return what each of eptc's own targets would need."""
    if missing:
        return {"onnx": f"needs {', '.join(missing)}: pip install 'ept-compiler[compile]'"}
    from eptc.interop.genai import GenAi, Interpreter
    from eptc.interop.targets import FOLDER_TARGETS
    from eptc.tensorrt.target import TensorRT
    from eptc.tensorrt.target import missing as lacking

    found = dict.fromkeys(("onnx", *FOLDER_TARGETS), "ready")
    without = lacking()
    found[TensorRT.name] = "ready" if without is None else f"ready; not for --build: {without}"
    try:
        interpreter = Interpreter.find(None)
        version = interpreter.versions["onnxruntime-genai"]
        found[GenAi.name] = f"ready: onnxruntime-genai {version} of {interpreter.path}"
    except InputError as error:
        found[GenAi.name] = f"{error.found}: {error.fix}"
    return found


def _plugins(group: Group, missing: Sequence[str]) -> dict[str, str]:
    """Return what other packages bring, and whether it can be used."""
    return {
        f"{plugin.name} ({plugin})": "needs the compiler" if missing else _state(plugin)
        for plugin in installed(group)
    }


def _state(plugin: Plugin) -> str:
    from eptc.added_passes import pass_class
    from eptc.checkpoint.installed import installed_format
    from eptc.targets import installed_target

    checks: dict[Group, Callable[[Plugin], object]] = {
        "eptc.readers": installed_format,
        "eptc.passes": pass_class,
        "eptc.targets": installed_target,
    }
    try:
        find_plugin(plugin.group, plugin.name)
        checks[plugin.group](plugin)
    except PluginError as error:
        return f"cannot be used: {error.found}"
    return "ready"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
