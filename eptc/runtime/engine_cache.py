"""TensorRT's engines, kept under what they were built from and for.

An engine runs on the kind of GPU and the version of TensorRT that built it, and ONNX Runtime takes
one that it finds by its file's name. Beside each there is a record: the GPU, its compute
capability, the driver, TensorRT, ONNX Runtime, the graph and weights (SHA-256), the provider's
options. What differs in any of them is never used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from eptc.errors import OptionError
from eptc.files import replacing
from eptc.runtime.gpu import find_driver, tensorrt_version
from eptc.runtime.manifest import bundle_file
from eptc.runtime.prepacked import sources
from eptc.runtime.providers import tensorrt_major

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eptc.runtime.manifest import Manifest
    from eptc.runtime.tensorrt import TensorRtOptions

__all__ = [
    "Builder",
    "Kept",
    "NewContext",
    "keep",
    "publish",
    "this_builder",
]

_FORMAT: Final = 1
_RECORD: Final = "record.json"
_TIMING: Final = "timing"
# How a record calls what an engine depends on, in the order that a difference is named.
_CALLED: Final = {
    "gpu": "GPU", "compute_capability": "compute capability", "tensorrt": "TensorRT",
    "driver": "driver", "onnxruntime": "ONNX Runtime",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Builder:
    """What an engine was, or would be, built on.

    Args:
        gpu: the GPU's name.
        compute_capability: its own, `8.6`.
        driver: the driver's version; the newest CUDA it runs where it does not say.
        tensorrt: TensorRT's version.
        onnxruntime: ONNX Runtime's.
    """

    gpu: str
    compute_capability: str
    driver: str
    tensorrt: str
    onnxruntime: str


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a session is opened from, and where its engine is kept.

    Args:
        graph: the file to open: the bundle's, or the EP-context model.
        options: the TensorRT provider's.
        engine: the file or folder of the engine that is used; None where it is built first.
        record: what an engine that is built now is kept under; None where none is.
        context: what is to be kept of it as an EP-context model; None likewise.
    """

    graph: Path
    options: Mapping[str, Any]
    engine: Path | None = None
    record: Mapping[str, Any] | None = None
    context: NewContext | None = None


class NewContext(NamedTuple):
    """An EP-context model that ONNX Runtime writes, and where it goes once it is whole."""

    unfinished: Path
    model: Path
    place: Path


def this_builder(device: int) -> Builder:
    """Return what engines are built on here.

    Args:
        device: the number of the GPU.

    Raises:
        OptionError: there is no such GPU, no driver or no TensorRT.
    """
    import onnxruntime

    driver = find_driver()
    if isinstance(driver, str):
        raise OptionError(f"TensorRT's engines cannot be kept: {driver}")
    if device >= len(driver.devices):
        raise OptionError(
            f"device_id is {device}", expected=f"0 to {len(driver.devices) - 1}, the GPUs here"
        )
    version = tensorrt_version(tensorrt_major())
    if version is None:
        raise OptionError("TensorRT's engines cannot be kept: its libraries are not found")
    gpu = driver.devices[device]
    return Builder(
        gpu.name, gpu.compute_capability, driver.version or f"for CUDA {driver.cuda}", version,
        onnxruntime.__version__,
    )  # fmt: skip


def keep(
    settings: TensorRtOptions, folder: Path, manifest: Manifest, name: str, builder: Builder
) -> Kept:
    """Return what one graph's session is opened from, and where its engine is kept.

    Args:
        settings: what the engine was told about TensorRT.
        folder: the bundle's folder.
        manifest: its manifest.
        name: the graph.
        builder: what engines are built on here.

    Raises:
        OptionError: profiles that do not fit; an engine that is another machine's, another
            bundle's, or nobody's.
        BundleError: the bundle's bytes are not those of its manifest.
    """
    spec = manifest.graphs[name]
    graph = bundle_file(folder, spec.file)
    options = settings.for_graph(folder, name, spec, manifest.precision)
    record = {
        "format": _FORMAT,
        "builder": dataclasses.asdict(builder),
        "graph": spec.file,
        "files": {f: manifest.files[f].sha256 for f in [spec.file, *sources(manifest, name)]},
        # A stream is a number of this process; it changes nothing in what is built.
        "options": {k: str(v) for k, v in sorted(options.items()) if "compute_stream" not in k},
    }
    if settings.cache is not None:
        return _cached(settings.cache, graph, options, record)
    if settings.context is not None:
        return _with_context(settings.context, graph, options, record)
    return Kept(graph, options)


def publish(name: str, new: NewContext, record: Mapping[str, Any]) -> None:
    """Put an EP-context model that is whole to where others look for one.

    Args:
        name: the graph, for messages.
        new: where it is, and goes to.
        record: what its engine was built from and for.

    Raises:
        OptionError: there is none, or the folder cannot be written.
    """
    if not new.unfinished.is_file():
        raise OptionError(
            f"TensorRT wrote no EP-context model of graph {name!r}",
            expected="a graph that it runs as a whole: export it with --target tensorrt",
        )
    _write(new.place, record)  # first: a model that is there is always known
    try:
        new.unfinished.replace(new.model)
    except OSError as error:
        raise OptionError(f"{new.model} cannot be written: {error}") from error


def _cached(cache: Path, graph: Path, options: dict[str, Any], record: Mapping[str, Any]) -> Kept:
    entry = cache / _key(record)
    place = entry / _RECORD
    built = any(entry.glob("*.engine"))
    _check(place, record, there=built)
    timing = cache / f"{_TIMING}-{_key(record['builder'])}"
    try:
        for folder in (entry, timing):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Before any engine is there: what is in the folder is always known.
        _write(place, record)
    except OSError as error:
        raise OptionError(f"the engine cache {cache} cannot be written: {error}") from error
    where = {
        "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(entry),
        "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(timing),
    }  # fmt: skip
    return Kept(graph, options | where, entry if built else None, record)


def _with_context(
    context: Path, graph: Path, options: dict[str, Any], record: Mapping[str, Any]
) -> Kept:
    """Return the EP-context model to open, or the graph and where to write one."""
    model = context / f"{graph.stem}_ctx.onnx"
    place = model.with_suffix(".json")
    if _check(place, record, there=model.exists()) and model.exists():
        return Kept(model, options, model)
    if "trt_profile_min_shapes" not in options:
        raise OptionError(
            "an EP-context model has one engine, and there are no shapes to build it for",
            fix="give 'profiles', or export the bundle with --target tensorrt",
        )
    try:
        context.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"the folder {context} cannot be written: {error}") from error
    # The engine inside the model: one file, which a record can speak for.
    unfinished = model.with_name(f"{graph.stem}_{uuid.uuid4().hex}.onnx").absolute()
    dump = {
        "trt_dump_ep_context_model": "1", "trt_ep_context_file_path": str(unfinished),
        "trt_ep_context_embed_mode": "1",
    }  # fmt: skip
    new = NewContext(unfinished, model, place)
    return Kept(graph, options | dump, None, record, new)


def _check(place: Path, record: Mapping[str, Any], *, there: bool) -> bool:
    """Return whether something is kept that fits; raise OptionError where it does not."""
    if not place.exists():
        if there:
            raise OptionError(
                f"{place.parent} has an engine, and {place.name} does not say what it is for",
                fix="remove the engine: it is built again",
            )
        return False
    try:
        found = json.loads(place.read_bytes())
        built = found["builder"]
        builder = {key: str(built[key]) for key in _CALLED}
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise OptionError(f"{place} cannot be read: {error!r}", fix="remove the engine") from error
    for key, called in _CALLED.items():
        if builder[key] != record["builder"][key]:
            raise OptionError(
                f"the engine of {place} was built for another {called}: {builder[key]}",
                expected=f"{called} {record['builder'][key]}, as it is here",
                fix="give another folder, or remove the engine: it is built again",
            )
    if found != record:
        raise OptionError(
            f"the engine of {place} was built from another bundle, or with other options",
            fix="give another folder, or remove the engine: it is built again",
        )
    return True


def _write(place: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    try:
        with replacing(place) as file:  # processes that start together write the same record
            file.write(text.encode())
    except OSError as error:
        raise OptionError(f"{place} cannot be written: {error}") from error


def _key(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
