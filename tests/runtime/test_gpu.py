"""What is asked of NVIDIA's libraries: on small libraries that answer as their documentation says.

They are compiled here and found by LD_LIBRARY_PATH in a process of its own, so that the calls are
real ones through ctypes. On a machine with a GPU the last test asks the real driver.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eptc.runtime.gpu import Driver, dotted, find_driver
from eptc.runtime.providers import missing_library, too_old

ROOT = Path(__file__).resolve().parents[2]

CUDA = """
#include <string.h>
#ifndef INIT
#define INIT 0
#endif
#ifndef COUNT
#define COUNT 2
#endif
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, device ? "NVIDIA L4" : "NVIDIA A10G", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 24ul << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? (device ? 9 : 6) : -1; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "no such luck"; return 0; }
static int pushed, waited;
int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)0x123400000000 + device; return device > 1; }
int cuCtxPushCurrent_v2(void *context) { pushed = context == (void *)0x123400000001; return 0; }
int cuCtxSynchronize(void) { waited = pushed; return pushed ? 0 : 7; }
int cuCtxPopCurrent_v2(void **context) { pushed = 0; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
"""
MANAGEMENT = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  strncpy(text, "570.86.10", size); return 0; }
"""
TENSORRT = "int getInferLibVersion(void) { return VERSION; }\n"

SAY = """
import dataclasses, json, sys
from eptc.errors import InternalError, OptionError
from eptc.runtime import engine_cache, gpu
driver = gpu.find_driver()
found = {"driver": driver if isinstance(driver, str) else dataclasses.asdict(driver)}
found["tensorrt"] = [gpu.tensorrt_version(None), gpu.tensorrt_version(10)]
found["loads"] = [gpu.load_tensorrt(10), gpu.load_tensorrt(8), gpu.load_tensorrt(None)]
found["waits"] = []
if not isinstance(driver, str):
    for device in (1, 0, 2):
        try:
            found["waits"].append(gpu.wait_for_device(device))
        except InternalError as error:
            found["waits"].append(error.found)
found["builders"] = []
for device in (1, 2):
    try:
        found["builders"].append(dataclasses.asdict(engine_cache.this_builder(device)))
    except OptionError as error:
        found["builders"].append(str(error))
print(json.dumps(found))
"""


def library(folder: Path, name: str, source: str, *defined: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    (folder / "source.c").write_text(source)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-w", *(f"-D{d}" for d in defined), "source.c", "-o", name],
        check=True, cwd=folder,
    )  # fmt: skip


def said(folder: Path) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-c", SAY], check=True, capture_output=True, text=True, cwd=folder,
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_driver_and_devices(tmp_path: Path) -> None:
    library(tmp_path, "libcuda.so.1", CUDA)
    library(tmp_path, "libnvidia-ml.so.1", MANAGEMENT)
    library(tmp_path, "libnvinfer.so.10", TENSORRT, "VERSION=100900")
    found = said(tmp_path)
    assert found["driver"] == {
        "version": "570.86.10",
        "cuda": "12.8",
        "devices": [
            {"name": "NVIDIA A10G", "compute_capability": "8.6", "memory": 24 << 30},
            {"name": "NVIDIA L4", "compute_capability": "8.9", "memory": 24 << 30},
        ],
    }
    assert found["tensorrt"] == ["10.9.0", "10.9.0"]
    other = "it is built for TensorRT 8, and what is installed is TensorRT 10"
    assert found["loads"] == [None, other, None]
    # Engines are built for the GPU that was named.
    builder, refusal = found["builders"]
    assert (builder["gpu"], builder["compute_capability"]) == ("NVIDIA L4", "8.9")
    assert (builder["driver"], builder["tensorrt"]) == ("570.86.10", "10.9.0")
    assert "device_id is 2" in refusal
    assert "0 to 1" in refusal
    # It waits in the context of the device that was named.
    assert found["waits"][0] is None
    assert found["waits"][1].startswith("CUDA device 0 does not answer: no such luck (7)")
    assert found["waits"][2].startswith("CUDA device 2 does not answer: no such luck (1)")


FAILURES = {
    "it does not start": (["INIT=803"], "the NVIDIA driver does not start: no such luck (803)"),
    "no device": (["COUNT=0"], "there is no NVIDIA device"),
}


@pytest.mark.parametrize(("defined", "message"), FAILURES.values(), ids=FAILURES)
def test_a_driver_that_does_not_work(tmp_path: Path, defined: list[str], message: str) -> None:
    library(tmp_path, "libcuda.so.1", CUDA, *defined)
    library(tmp_path, "libnvinfer.so.8", TENSORRT, "VERSION=8601")
    found = said(tmp_path)
    assert found["driver"] == message
    assert found["tensorrt"] == ["8.6.1", None]
    assert found["loads"][0] == "it is built for TensorRT 10, and what is installed is TensorRT 8"


def test_versions() -> None:
    assert [dotted(n) for n in (8601, 100000, 100307)] == ["8.6.1", "10.0.0", "10.3.7"]


TOO_OLD = {
    "an older major": (("12.8", "13.0", "570.86"), "runs CUDA up to 12.8"),
    "another minor": (("13.0", "13.2", None), None),
    "a newer driver": (("13.1", "12.4", None), None),
    "nobody says": (("12.8", "", None), None),
}


@pytest.mark.parametrize(("given", "message"), TOO_OLD.values(), ids=TOO_OLD)
def test_a_driver_that_is_too_old(given: tuple[str, str, str | None], message: str | None) -> None:
    found = too_old(*given)
    assert (found is None) == (message is None)
    if message is not None and found is not None:
        assert message in found
        assert "the NVIDIA driver 570.86" in found
        assert "built for CUDA 13.0: install a newer driver" in found


def test_libraries_that_do_not_load() -> None:
    lines = (
        "Failed to load libcudnn.so.9: libcudnn.so.9: cannot open shared object file\n"
        "Failed to load libcublas.so.13: no\nPlease follow https://onnxruntime.ai\n"
    )
    found = missing_library(lines, "13.0")
    assert found is not None
    assert found.startswith("Failed to load libcudnn.so.9")
    assert "and 1 more: install CUDA 13.0 and cuDNN 9" in found
    assert "onnxruntime-gpu[cuda,cudnn]" in found
    assert missing_library("Skip loading CUDA", "13.0") is None


@pytest.mark.gpu
def test_the_real_driver(cuda: str) -> None:
    driver = find_driver()
    assert isinstance(driver, Driver), cuda
    assert float(driver.cuda) >= 11
    for device in driver.devices:
        assert device.name
        assert device.memory > 1 << 30
        assert float(device.compute_capability) >= 5
