"""The folders of the TuckA authors' code, read into tensors by linear."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from eptc.errors import CheckpointError
from eptc.nn.stored import name_some, read_json, read_pickle, read_safetensors

__all__ = ["CONFIG", "StoredTucka", "read"]

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<path>.+)\.tucka_(?P<part>g|c|u|ec)")
# A saved head is a copy: what of it is stored beside the copy's own names is read by nothing.
_DEAD = re.compile(r"(.+\.)?(modules_to_save|original_module)\..+")
_HEADS = ("classifier", "score")


@dataclasses.dataclass(frozen=True)
class StoredTucka:
    """A checkpoint in memory.

    Args:
        groups: how many groups of experts there are.
        experts: how many experts a group has.
        alpha: factor of what the adapters add to an input.
        layers: the parts `g`, `c` and `u` of each adapted linear by its path.
        router: path of the linear that routes.
        centroids: the router's [groups * experts, in].
        parameters: what replaces the base's parameters of the same name.
    """

    groups: int
    experts: int
    alpha: float
    layers: Mapping[str, Mapping[str, Tensor]]
    router: str
    centroids: Tensor
    parameters: Mapping[str, Tensor]


def read(directory: Path, *, allow_pickle: bool = False) -> StoredTucka:
    """Return the adapter in a folder.

    Args:
        directory: the folder with `adapter_config.json`.
        allow_pickle: whether `adapter_model.bin` may be read.

    Raises:
        OptionError: the weights are a pickle and it may not be read.
        CheckpointError: a file or a tensor is missing, damaged or without a place.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "TUCKA" or config.get("use_alb"):
        raise CheckpointError(
            f"{directory / CONFIG} is not of a TuckA adapter that can have been trained",
            expected="peft_type TUCKA, use_alb false",
        )
    if not all(type(config.get(key)) is int for key in "rktp") or (
        type(config.get("alpha")) not in (int, float)
    ):
        raise CheckpointError(
            f"{directory / CONFIG} has no sound r, k, t, p or alpha",
            expected="whole numbers r, k, t and p, and the number alpha, as training wrote them",
            fix="add what is missing to it as the training command had it",
        )
    if (path := directory / "adapter_model.safetensors").is_file():
        tensors = read_safetensors(path)
    else:
        tensors = read_pickle(directory / "adapter_model.bin", allowed=allow_pickle)
    layers, parameters = _sort(tensors)
    inert = [name for name in layers if name.split(".")[0] in _HEADS]
    if inert and config["k"] > 1:
        raise CheckpointError(f"{inert[0]} in {directory} has an adapter that cannot have run")
    # The adapter of a copied head never saw a route: it adds nothing.
    layers = {name: parts for name, parts in layers.items() if name not in inert}
    return _checked(directory, config, layers, parameters)


def _sort(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the parts of the adapters by linear, and all other tensors by their plain names."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    parameters = {}
    for stored, tensor in tensors.items():
        name = stored.removeprefix(_PREFIX)
        if name == stored:
            raise CheckpointError(f"the checkpoint has the tensor {name}", expected=f"{_PREFIX}*")
        if _DEAD.fullmatch(name):
            continue
        if match := _PART.fullmatch(name):
            layers[match["path"]][match["part"]] = tensor
        else:
            parameters[name.replace(".base_layer.", ".")] = tensor
    return dict(layers), parameters


def _checked(
    directory: Path,
    config: Mapping[str, Any],
    layers: Mapping[str, dict[str, Tensor]],
    parameters: Mapping[str, Tensor],
) -> StoredTucka:
    routers = [path for path, parts in layers.items() if "ec" in parts]
    if len(routers) != 1:
        raise CheckpointError(
            f"{directory} has {len(routers)} routers: {name_some(routers)}", expected="one"
        )
    centroids = layers[routers[0]].pop("ec")
    r, k, t, p = (config[key] for key in ("r", "k", "t", "p"))
    for path, parts in layers.items():
        found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        if (
            found.keys() != {"g", "c", "u"}
            or (found["g"], found["c"], found["u"][1:]) != ((k, p, r, r), (t, p), (r,))
            or len(found["u"]) != 2
        ):
            raise CheckpointError(f"{path} in {directory} has the tensors {found}")
    return StoredTucka(k, t, float(config["alpha"]), layers, routers[0], centroids, parameters)
