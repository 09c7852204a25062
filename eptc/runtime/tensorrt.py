"""Options of ONNX Runtime's TensorRT provider, as an engine takes them.

`providers=[("tensorrt", {"cache": "engines/"}), "cuda"]`. Beside the provider's own options, whose
names begin with `trt_`, there are:

    cache         folder to keep built engines and timing caches in, each under what it was built
                  from and for: another GPU, driver or TensorRT finds nothing there
    context       folder of EP-context models, graphs that carry their built engine; made there
                  where there are none, and refused where they are another machine's
    profiles      shapes engines are built for: by graph and input, `min`, `opt` and `max`; without
                  it the bundle's profiles.json, else an engine is built for shapes as they come
    workspace_gb  memory that building may take, GiB

16-bit and 8-bit kernels are used where the bundle is of that precision, and was verified so.

Written against ONNX Runtime's documentation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from eptc.errors import OptionError
from eptc.similar_names import did_you_mean

if TYPE_CHECKING:
    from eptc.runtime.spec import GraphSpec

__all__ = ["PROFILES", "Shapes", "TensorRtOptions", "profile_options", "read_profiles"]

PROFILES: Final = "profiles.json"
_BOUNDS: Final = ("min", "opt", "max")
_GIB: Final = 1 << 30
# Kernels that are used where the graph is of that precision.
_KERNELS: Final = {
    "fp16": ("trt_fp16_enable",), "bf16": ("trt_bf16_enable",),
    "int8-static": ("trt_int8_enable",), "fp8-fp16": ("trt_fp16_enable",),
    "int8-fp16": ("trt_int8_enable", "trt_fp16_enable"),
}  # fmt: skip
# What would have engines kept without a word about what they are for.
_KEEPING: Final = {
    "trt_engine_cache_enable": "cache", "trt_engine_cache_path": "cache",
    "trt_engine_cache_prefix": "cache", "trt_timing_cache_enable": "cache",
    "trt_timing_cache_path": "cache", "trt_dump_ep_context_model": "context",
    "trt_ep_context_file_path": "context", "trt_ep_context_embed_mode": "context",
}  # fmt: skip
# It would capture once and replay that for every shape and address: it has no gpu_graph_id.
_CAPTURE: Final = "trt_cuda_graph_enable"
_PLAIN: Final = ("device_id", "has_user_compute_stream", "user_compute_stream")

# Sizes by input and bound.
Shapes = dict[str, dict[str, list[int]]]


@dataclasses.dataclass(frozen=True)
class TensorRtOptions:
    """What an engine was told about TensorRT.

    Args:
        own: options that go to the provider as they are.
        cache: folder of engines; None: none are kept.
        context: folder of EP-context models; None: none are made or read.
        profiles: by graph, the shapes of its inputs; None: the bundle's, if it has any.
        workspace_gb: GiB that building may take; None: TensorRT's own bound.
    """

    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache: Path | None = None
    context: Path | None = None
    profiles: Mapping[str, Shapes] | None = None
    workspace_gb: float | None = None

    @property
    def device(self) -> int:
        """The number of the GPU."""
        return int(self.own.get("device_id", 0))

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> TensorRtOptions:
        """Read the options of a pair of provider and options.

        Raises:
            OptionError: an unknown name, with the nearest known one; a value that is none; two
                that exclude one another.
        """
        named = [field.name for field in dataclasses.fields(cls) if field.name != "own"]
        own = {key: value for key, value in options.items() if key not in named}
        for key in own:
            if key in _KEEPING:
                raise OptionError(
                    f"{key} is given, which keeps engines without saying what they are for",
                    fix=f"give {_KEEPING[key]!r}, a folder, instead",
                )
            if not key.startswith("trt_") and key not in _PLAIN:
                raise OptionError(
                    f"TensorRT has no option {key!r}{did_you_mean(key, named)}",
                    expected=f"{', '.join(named)}, {', '.join(_PLAIN)}, or the provider's own, "
                    "which begin with trt_",
                )
        if options.get("cache") is not None and options.get("context") is not None:
            raise OptionError(
                "'cache' and 'context' are both given",
                fix="leave one out: a context has its engine",
            )
        if str(own.get(_CAPTURE, "0")).lower() not in ("0", "false"):
            raise OptionError(
                f"{_CAPTURE} is given: what is captured for one shape would answer every other",
                fix="leave it out; fixed shapes are captured on CUDA, with enable_cuda_graph",
            )
        if not re.fullmatch(r"[0-9]+", str(device := own.get("device_id", 0)), re.ASCII):
            raise OptionError(f"device_id is {device!r}", expected="the number of a GPU")
        memory = options.get("workspace_gb")
        if memory is not None and not (_is_number(memory) and 0 < memory < math.inf):
            raise OptionError(f"workspace_gb is {memory!r}", expected="a number above 0")
        profiles = options.get("profiles")
        if profiles is not None and not isinstance(profiles, Mapping):
            raise OptionError(
                f"profiles is {profiles!r}", expected="by graph and input, min, opt and max"
            )
        folders = {key: _folder(key, options.get(key)) for key in ("cache", "context")}
        return cls(own, **folders, profiles=profiles, workspace_gb=memory)

    def for_any(self, precision: str) -> dict[str, Any]:
        """Return the provider's options that do not depend on the graph.

        Args:
            precision: the bundle's.
        """
        found: dict[str, Any] = {}
        found |= dict.fromkeys(_KERNELS.get(precision, ()), "1")
        if self.workspace_gb is not None:
            found["trt_max_workspace_size"] = str(int(self.workspace_gb * _GIB))
        return found | dict(self.own)

    def for_graph(
        self, folder: Path, name: str, spec: GraphSpec, precision: str
    ) -> dict[str, Any]:
        """Return the provider's options for one graph, but those that say where engines are kept.

        Args:
            folder: the bundle's.
            name: the graph.
            spec: its interface.
            precision: the bundle's.

        Raises:
            OptionError: profiles that do not fit the graph.
        """
        found: dict[str, Any] = {}
        given = read_profiles(folder) if self.profiles is None else self.profiles
        if given is not None:
            if name not in given:
                raise OptionError(
                    f"there is no profile of graph {name!r}", expected=", ".join(given) or "some"
                )
            found = profile_options(given[name], spec)
        return found | self.for_any(precision)


def read_profiles(folder: Path) -> dict[str, Shapes] | None:
    """Return the shapes a bundle's graphs are to be built for, by graph; None if it has none.

    Raises:
        OptionError: the file is not what `--target tensorrt` writes.
    """
    path = folder / PROFILES
    if not path.is_file():
        return None
    try:
        graphs = json.loads(path.read_bytes())["graphs"]
        return {name: graph["inputs"] for name, graph in graphs.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise OptionError(f"{path} cannot be read: {error!r}") from error


def profile_options(shapes: Mapping[str, Any], spec: GraphSpec) -> dict[str, str]:
    """Return the options that give an engine its shapes.

    Args:
        shapes: by input, `min`, `opt` and `max`, each a list of sizes.
        spec: the graph's interface.

    Raises:
        OptionError: an input too few or too many, sizes that do not fit its shape, or are not in
            order.
    """
    dynamic = {
        tensor.name: tensor.shape
        for tensor in spec.inputs
        if any(isinstance(dim, str) for dim in tensor.shape)
    }
    if not isinstance(shapes, Mapping):
        raise OptionError(
            f"the profile is {shapes!r}", expected=f"a shape for each of {', '.join(dynamic)}"
        )
    if set(shapes) != set(dynamic):
        wrong = sorted(set(shapes) ^ set(dynamic))[0]
        raise OptionError(
            f"the profile {'lacks' if wrong in dynamic else 'has'} the input {wrong!r}",
            expected=f"a shape for each of {', '.join(dynamic)}",
        )
    for name, shape in dynamic.items():
        _check_profile(name, shapes[name], shape)
    return {
        f"trt_profile_{bound}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, shapes[name][bound]))}" for name in dynamic
        )
        for bound in _BOUNDS
    }


def _check_profile(name: str, given: Any, shape: tuple[int | str, ...]) -> None:
    expected = f"{', '.join(_BOUNDS)}, each [{', '.join(map(str, shape))}]"
    try:
        bounds = [list(given[bound]) for bound in _BOUNDS]
    except (KeyError, TypeError) as error:
        raise OptionError(f"the profile of {name!r} is {given!r}", expected=expected) from error
    for sizes in bounds:
        if len(sizes) != len(shape) or not all(type(size) is int and size >= 0 for size in sizes):
            raise OptionError(f"the profile of {name!r} has {sizes}", expected=expected)
        if any(
            isinstance(dim, int) and dim != size for dim, size in zip(shape, sizes, strict=True)
        ):
            raise OptionError(f"the profile of {name!r} has {sizes}", expected=expected)
    if any(not low <= usual <= high for low, usual, high in zip(*bounds, strict=True)):
        raise OptionError(f"the profile of {name!r} is {given}", expected="min <= opt <= max")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _folder(key: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value):
        raise OptionError(f"{key!r} is {value!r}", expected="a folder")
    return Path(value).expanduser()
