"""Task models without numbers: traced once for a configuration, kept for later builds.

A traced graph depends on the configuration, the options of the trace and the code that makes
it, so these are what it is kept under: a second task of a checkpoint traces nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

from eptc import lower
from eptc.cache import cache_folder, code_hash
from eptc.files import replacing
from eptc.ir import PromptLayout

__all__ = ["Skeleton", "known_parameters", "skeleton"]

logger = logging.getLogger(__name__)

_TOOLS = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
_PARAMETERS = "parameters.json"
_SUFFIX = ".onnx"
# The "file" of an initializer that has no data yet.
_UNBOUND = "unbound"

# What a damaged or foreign file may raise: it is traced again.
_UNREADABLE = (
    OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, EOFError,
    NotImplementedError, DecodeError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A task model without numbers.

    Args:
        parameters: the shape of every parameter by canonical name.
        graphs: its ONNX graphs; initializers have no data.
    """

    parameters: Mapping[str, tuple[int, ...]]
    graphs: Mapping[str, onnx_ir.Model]

    def copy_graphs(self) -> dict[str, onnx_ir.Model]:
        """Return graphs that the caller may change."""
        return {name: model.clone() for name, model in self.graphs.items()}


def skeleton(
    config: Any, *, opset: int, tied_head: bool, prompts: PromptLayout | None = None
) -> Skeleton:
    """Return the skeleton of a configuration, traced only if no build has done so before.

    Args:
        config: a transformers configuration.
        opset: version of the ONNX operators.
        tied_head: whether the output projection is the embedding.
        prompts: the prompts before the text, if there are any.

    Raises:
        BaseModelError: the model type or one of its options is not supported.
    """
    return _skeleton(_settings(config), str(config.model_type), opset, tied_head, prompts)


def known_parameters(
    config: Any, *, opset: int, tied_head: bool, prompts: PromptLayout | None = None
) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every parameter of the task model by canonical name.

    Arguments and errors as for `skeleton`; nothing is traced.
    """
    settings = _settings(config)
    if found := _load(_key(settings, opset, tied_head, prompts)):
        return found.parameters
    return lower.expected_parameters(config, tied_head=tied_head, prompts=prompts)


def _settings(config: Any) -> str:
    """Return the configuration as JSON: how many labels there are, not what they are called."""
    names = {i: f"LABEL_{i}" for i in range(config.num_labels)}
    unnamed = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    return json.dumps({**config.to_dict(), **unnamed}, sort_keys=True)


@functools.lru_cache(maxsize=4)
def _skeleton(
    settings: str, model_type: str, opset: int, tied_head: bool, prompts: PromptLayout | None
) -> Skeleton:
    key = _key(settings, opset, tied_head, prompts)
    if found := _load(key):
        return found
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type].from_dict(json.loads(settings))
    parameters = lower.expected_parameters(config, tied_head=tied_head, prompts=prompts)
    members = {_PARAMETERS: json.dumps(parameters).encode()}
    graphs = lower.trace(config, opset=opset, tied_head=tied_head, prompts=prompts)
    for name, model in graphs.items():
        members[name + _SUFFIX] = _serialize(model)
    _store(key, members)
    # Read back even now: a build with a cache and one without take the same road.
    return _read(members)


def _key(settings: str, opset: int, tied_head: bool, prompts: PromptLayout | None) -> str:
    tools = {name: importlib.metadata.version(name) for name in _TOOLS}
    layout = None if prompts is None else prompts.to_json()
    described = [settings, opset, tied_head, layout, tools, sys.version_info[:2], _code()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Return the SHA-256 of the code that makes skeletons."""
    home = Path(__file__).parent
    return code_hash(
        [
            *sorted((home / "lower").glob("*.py")),
            home / "architectures.py",
            home / "ir" / "prompts.py",
            Path(__file__),
        ]
    )


def _place(key: str) -> Path | None:
    folder = cache_folder()
    return folder / "skeletons" / f"{key}.zip" if folder is not None else None


def _load(key: str) -> Skeleton | None:
    """Return the skeleton kept under a key; None where there is none, or none that is whole."""
    path = _place(key)
    if path is None or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return _read({name: archive.read(name) for name in archive.namelist()})
    except _UNREADABLE as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return None


def _store(key: str, members: Mapping[str, bytes]) -> None:
    """Keep a skeleton; where that cannot be done, the next build traces again."""
    path = _place(key)
    if path is None:
        return
    try:
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    except OSError as error:
        logger.info("the traced graphs are not kept in %s: %s", path.parent, error)


def _read(members: Mapping[str, bytes]) -> Skeleton:
    shapes = json.loads(members[_PARAMETERS])
    graphs = {
        name.removesuffix(_SUFFIX): _parse(content)
        for name, content in members.items()
        if name != _PARAMETERS
    }
    return Skeleton({name: tuple(shape) for name, shape in shapes.items()}, graphs)


def _serialize(model: onnx_ir.Model) -> bytes:
    """Return an unbound model's bytes; its initializers point to a file that is not there."""
    copied = model.clone()
    for value in copied.graph.initializers.values():
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = onnx_ir.ExternalTensor(
                _UNBOUND, 0, 0, value.dtype, shape=value.shape, name=str(value.name)
            )
    content: bytes = onnx_ir.to_proto(copied).SerializeToString(deterministic=True)
    return content


def _parse(content: bytes) -> onnx_ir.Model:
    model: onnx_ir.Model = onnx_ir.from_proto(onnx.ModelProto.FromString(content))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            value.const_value = None
    return model
