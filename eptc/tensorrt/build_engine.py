"""Build TensorRT engines of the graphs in this folder, and say what they were built by and for.

    python3 build_engine.py                 # every graph, by the shapes in profiles.json
    python3 build_engine.py --graph decoder
    python3 build_engine.py --record        # engines that trtexec built: write engines.json alone

Writes GRAPH.engine for each graph, the timing cache timing.cache, which makes the next build
faster, and engines.json: the versions of TensorRT and the driver, and the GPU. An engine runs with
that version and on that GPU alone. The precision is the graph's own: it is built strongly typed.

Needs the package `tensorrt`, 10 or newer, and nothing else beside an NVIDIA driver.
Written against TensorRT's documentation; never run on a GPU yet.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

PROFILES = "profiles.json"
RECORD = "engines.json"
TIMING_CACHE = "timing.cache"
# Of cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_CAPABILITY = (75, 76)
_TEXT = 256
# Versions of TensorRT: the first with which this works, and the first whose networks are always
# strongly typed.
_OLDEST, _ALWAYS_TYPED = 10, 11


class BuildError(Exception):
    """Why no engine was built."""


def machine(device: int = 0) -> dict[str, Any]:
    """Return what an engine depends on: `gpu`, `compute_capability` and `driver`.

    Args:
        device: number of the GPU.

    Raises:
        BuildError: there is no driver, or no such GPU.
    """
    cuda = _library("libcuda.so.1", "nvcuda.dll")
    _cuda(cuda.cuInit(0), "cuInit")
    handle = ctypes.c_int()
    _cuda(cuda.cuDeviceGet(ctypes.byref(handle), device), f"GPU {device}")
    name = ctypes.create_string_buffer(_TEXT)
    _cuda(cuda.cuDeviceGetName(name, _TEXT, handle), "cuDeviceGetName")
    numbers = []
    for attribute in _CAPABILITY:
        number = ctypes.c_int()
        _cuda(
            cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle),
            "cuDeviceGetAttribute",
        )
        numbers.append(number.value)
    return {
        "gpu": name.value.decode(),
        "compute_capability": f"{numbers[0]}.{numbers[1]}",
        "driver": _driver(),
    }


def _driver() -> str:
    nvml = _library("libnvidia-ml.so.1", "nvml.dll")
    text = ctypes.create_string_buffer(_TEXT)
    for action in (nvml.nvmlInit_v2, lambda: nvml.nvmlSystemGetDriverVersion(text, _TEXT)):
        if code := action():
            raise BuildError(f"the driver's version cannot be read: NVML error {code}")
    return text.value.decode()


def _library(*names: str) -> Any:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError(f"there is no NVIDIA driver: {names[0]} does not load")


def _cuda(code: int, what: str) -> None:
    if code:
        raise BuildError(f"no GPU can be used: {what}: CUDA error {code}")


def package() -> Any:
    """Return the package `tensorrt`.

    Raises:
        BuildError: it does not load, or is older than 10.
    """
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise BuildError(f"the package tensorrt does not load: {error}") from error
    if _major(trt) < _OLDEST:
        raise BuildError(f"TensorRT {trt.__version__} is here, and {_OLDEST} or newer is needed")
    return trt


def _major(trt: Any) -> int:
    return int(trt.__version__.split(".")[0])


def build(folder: Path, role: str, graph: dict[str, Any], workspace: int | None) -> None:
    """Build the engine of one graph.

    Args:
        folder: where the graph lies and the engine is written.
        role: the graph's name in profiles.json.
        graph: its entry there.
        workspace: bytes of GPU memory that kernels may use; None: all there is.

    Raises:
        BuildError: TensorRT does not take the graph, or finds no kernels.
    """
    trt = package()
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = _major(trt) >= _ALWAYS_TYPED
    flags = 0 if typed else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / graph["file"])):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{graph['file']} is not taken: {'; '.join(errors)}")
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    profile = builder.create_optimization_profile()
    for name, shapes in graph["inputs"].items():
        profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"{graph['file']} does not take the shapes of {PROFILES}")
    cached = folder / TIMING_CACHE
    timings = config.create_timing_cache(cached.read_bytes() if cached.is_file() else b"")
    # Those of another GPU or version are not taken, nor is a damaged file; then it starts anew.
    if timings is None or not config.set_timing_cache(timings, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"no engine can be built of {graph['file']}: the lines above say why")
    (folder / f"{role}.engine").write_bytes(bytes(engine))
    cached.write_bytes(bytes(config.get_timing_cache().serialize()))


def record(folder: Path, graphs: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be known of the engines in a folder, as JSON values.

    Raises:
        BuildError: there are none, or nothing that runs them.
    """
    engines = {
        role: {
            "file": f"{role}.engine",
            "sha256": _sha256(folder / f"{role}.engine"),
            "graph_sha256": _sha256(folder / graph["file"]),
        }
        for role, graph in graphs.items()
        if (folder / f"{role}.engine").is_file()
    }
    if not engines:
        raise BuildError(f"there are no engines in {folder}: build them first")
    version = package().__version__
    return {"schema_version": 1, "tensorrt": version, **machine(), "engines": engines}


def with_earlier(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the engines that were recorded before, by the same and for the same.

    Args:
        folder: where a record may lie.
        found: the new one, which may be of some of the graphs.
    """
    try:
        earlier = json.loads((folder / RECORD).read_text("utf-8"))
        same = all(earlier[key] == value for key, value in found.items() if key != "engines")
        return {**found, "engines": {**earlier["engines"], **found["engines"]}} if same else found
    except (OSError, ValueError, LookupError, TypeError):
        return found  # there is none, or nothing that can be read


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def main() -> int:
    """Build, and return the exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--graph", help="this graph alone")
    options.add_argument("--record", action="store_true", help="write engines.json alone")
    options.add_argument("--workspace", type=int, metavar="MIB", help="GPU memory for kernels")
    given = options.parse_args()
    folder = Path(__file__).resolve().parent
    graphs = json.loads((folder / PROFILES).read_text("utf-8"))["graphs"]
    if given.graph is not None and given.graph not in graphs:
        options.error(f"there is no graph {given.graph!r}, but {', '.join(graphs)}")
    chosen = [given.graph] if given.graph else list(graphs)
    try:
        package()  # before minutes of work
        machine()
        for role in chosen if not given.record else ():
            build(folder, role, graphs[role], given.workspace and given.workspace * 2**20)
        found = with_earlier(folder, record(folder, {role: graphs[role] for role in chosen}))
    except BuildError as error:
        sys.stderr.write(f"build_engine.py: error: {error}\n")
        return 2
    text = json.dumps(found, indent=2) + "\n"
    (folder / RECORD).write_text(text, "utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
