"""The base model's folder: configuration, lazy weights under their names in the task model."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptc.architectures import Architecture, architecture, canonical_name, head_is_tied
from eptc.errors import BaseModelError, CheckpointError
from eptc.tensors import LazyTensor, SafetensorsFile, StoredTensor, content_hash

__all__ = ["BaseModel", "Finite", "read_base", "read_json", "refuse_outside"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A base model's folder, its weights unread.

    Args:
        path: the folder.
        config: its config.json.
        architecture: what eptc knows of its model type.
        stored: every tensor by its name on disk.
        weights: the tensors by their names in the task model; tied ones once.
        unused: names on disk that are known to have no place in the task model, sorted.
        tied_head: whether the output projection is the embedding itself.
    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    stored: Mapping[str, StoredTensor]
    weights: Mapping[str, LazyTensor]
    unused: tuple[str, ...]
    tied_head: bool

    @functools.cached_property
    def sha256(self) -> str:
        """Content hash of the stored tensors: the same for any sharding.

        Reads every tensor once and checks on the way that every number is finite.

        Raises:
            BaseModelError: a NaN or an infinity, with the tensor's name.
        """
        return content_hash(Finite(tensor, self.path) for tensor in self.stored.values())

    @functools.cached_property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """[out, in] of every module whose weight is a matrix, by the module's path."""
        return {
            name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
            for name, tensor in self.weights.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        }


class Finite(LazyTensor):
    """A tensor that refuses to be read where a number is NaN or infinite."""

    def __init__(self, tensor: LazyTensor, where: Path) -> None:
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape
        self._tensor = tensor
        self._where = where

    def numpy(self) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        """Return the numbers.

        Raises:
            CheckpointError: a NaN or an infinity.
        """
        array = self._tensor.numpy()
        if self.dtype in _FLOATS and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0]
            raise CheckpointError(
                f"{self.name} in {self._where} has {array[tuple(bad)]} at {bad.tolist()}",
                expected="finite numbers only",
                fix="train or save the checkpoint again: it cannot give sound answers",
            )
        return array


def read_json(path: Path, error: type[CheckpointError] | type[BaseModelError]) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError | BaseModelError: as `error` says; the file is missing or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{path.parent} has no {path.name}") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise error(
            f"{path} cannot be read as JSON: {cause}", fix="copy the file again"
        ) from cause
    if not isinstance(data, dict):
        raise error(f"{path} holds a {type(data).__name__}", expected="a JSON object")
    return data


def read_base(path: Path) -> BaseModel:
    """Read a Hugging Face model folder: its configuration and its weights' names and shapes.

    Raises:
        BaseModelError: not a folder, no or bad config.json, a quantised or unsupported model,
            weights that are missing, not safetensors, or outside the folder.
    """
    if not path.is_dir():
        raise BaseModelError(
            f"the base model {path} is not a folder",
            expected="a Hugging Face model folder: config.json and model.safetensors",
            fix="give the folder of the model the adapters were trained on with --base",
        )
    config = read_json(path / "config.json", BaseModelError)
    _refuse_quantised(path, config)
    refuse_outside(path, config)
    family = architecture(config)
    stored = _read_weights(path)
    tied = _head_is_tied(family, config, stored)
    weights: dict[str, LazyTensor] = {}
    unused = []
    for name in sorted(stored):
        canonical = canonical_name(name, config, tied_head=tied)
        if canonical is None:
            unused.append(name)
        elif canonical not in weights:
            weights[canonical] = stored[name]
        elif not _equal(weights[canonical], stored[name]):
            raise BaseModelError(
                f"{path} stores {canonical} twice, as {weights[canonical].name} and as {name}, "
                "with different numbers",
                fix="load the model in transformers, check it, and save it again",
            )
    for name, weight in weights.items():
        if weight.dtype not in _FLOATS:
            raise BaseModelError(
                f"{name} in {path} has the type {weight.dtype}",
                expected="a model that is not quantised: float32, float16 or bfloat16 weights",
            )
    return BaseModel(path, config, family, stored, weights, tuple(sorted(unused)), tied)


def _head_is_tied(
    family: Architecture, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> bool:
    """Tell whether the output projection is the embedding itself, as transformers does.

    A head that is stored beside the embedding is tied only where the configuration says so and
    the numbers are the same. T5 without a stored head is tied whatever its configuration says.
    """
    head = stored.get(family.head)
    if head is None:
        return family.model_type == "t5" or head_is_tied(config)
    embeddings = [t for n, t in stored.items() if canonical_name(n, config) == family.embedding]
    return head_is_tied(config) and all(_equal(head, t) for t in embeddings)


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return one is other or (same and bool(np.array_equal(one.numpy(), other.numpy())))


def _refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = "unknown"
    if isinstance(quantization, Mapping):
        method = str(quantization.get("quant_method", "unknown"))
        if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
            method = "bitsandbytes"
    raise BaseModelError(
        f"the base model {path} is quantised ({method.upper()})",
        expected="the float32, float16 or bfloat16 model it was quantised from",
        fix="give that model with --base; quantise after compiling",
    )


def refuse_outside(path: Path, config: Mapping[str, Any] | None = None) -> None:
    """Refuse file names that lead out of a folder, in a model's or a tokenizer's configuration.

    Transformers reads these keys as file names, relative to wherever they point.

    Raises:
        BaseModelError: which entry points where.
    """
    files: dict[str, Any] = {"transformers_weights": (config or {}).get("transformers_weights")}
    tokenizer = path / "tokenizer_config.json"
    if tokenizer.is_file():
        entries = read_json(tokenizer, BaseModelError)
        files.update({key: entries[key] for key in entries if key.endswith("_file")})
    for key, value in files.items():
        if value is not None and not _is_file_name(value):
            raise BaseModelError(
                f"{key} of {path} points outside its folder: {value!r}",
                expected="the name of a file in the folder",
                fix="put the file into the folder and correct the entry",
            )


def _is_file_name(value: object) -> bool:
    """Whether a value names a file in its own folder, not a way out of it."""
    return isinstance(value, str) and Path(value).name == value and value not in ("", "..")


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    if (path / _INDEX).is_file():
        return _read_shards(path)
    if not (path / _SINGLE).is_file():
        pickled = sorted(p.name for p in path.glob("*.bin"))
        raise BaseModelError(
            f"{path} has no {_SINGLE} and no {_INDEX}"
            + (f", only {', '.join(pickled[:3])}" if pickled else ""),
            expected="weights as safetensors",
            fix="load the model in transformers and save it with save_pretrained"
            if pickled
            else "copy the model's weights into the folder",
        )
    return dict(SafetensorsFile(path / _SINGLE).items())


def _read_shards(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path / _INDEX, BaseModelError)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BaseModelError(f"{path / _INDEX} has no weight_map", fix="copy the file again")
    for shard in names.values():
        if not _is_file_name(shard):
            raise BaseModelError(
                f"{path / _INDEX} points outside its folder: {shard!r}",
                expected="names of files in the folder",
            )
    shards = {shard: SafetensorsFile(path / shard) for shard in sorted(set(names.values()))}
    missing = [name for name, shard in names.items() if name not in shards[shard]]
    if missing:
        raise BaseModelError(
            f"{names[missing[0]]} in {path} lacks {missing[0]}, which the index says it holds",
            fix="copy the shards and the index again, from one source",
        )
    extra = [n for shard, file in shards.items() for n in file if names.get(n) != shard]
    if extra:
        raise BaseModelError(f"{path / _INDEX} does not list {extra[0]}, which a shard holds")
    return {name: shards[shard][name] for name, shard in names.items()}
