"""A MEPT checkpoint's files: settings, and tensors by the names of the plain task model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from eptc.errors import CheckpointError, OptionError
from eptc.nn.stored import read_json

__all__ = ["StoredMept", "StoredSite", "is_mept", "read"]

ADAPTER = "adapter_config.json"
TRAINING = "train_args.json"
# Complete files before files of what was trained alone, safetensors before pickles.
_FILES = (
    "model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin",
    "trainable_only.safetensors", "trainable_only.bin",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
_METHODS = {"PROMPT_EXPERT": "prompt-expert", "PROMPT_ROUTING": "prompt-routing"}
_BLOCK = re.compile(
    r"(?:encoder\.block|model\.layers)\.(?P<block>\d+)\."
    r"(?P<part>prompt_embedding\.weight|prompt_router\.0\.weight|shared_embedding"
    r"|layer_norm\.weight)"
)
_INPUT = re.compile(
    r"(?:prompt_encoder\.)?"
    r"(?P<part>(?:prompt_)?embedding\.weight|(?:prompt_)?router\.0\.weight|shared_embedding"
    r"|layer_norm\.weight)"
)
_ROLES = {
    "prompt_embedding.weight": "experts",
    "embedding.weight": "experts",
    "prompt_router.0.weight": "router",
    "router.0.weight": "router",
    "shared_embedding": "shared",
    "layer_norm.weight": "norm",
}
# The decoder's extra norms are read by no forward pass, a router's noise only in training, and
# the last is the embedding under another name.
_UNUSED = re.compile(r"decoder\.block\.\d+\.layer_norm\.weight|.*\.noise|word_embeddings\.weight")

_FLAGS = ("stochastic", "gumbel", "shared_expert")
_NUMBERS = ("topk", "num_virtual_tokens", "num_virtual_tokens_full", "tokenizer_length")
# By role: experts [R * n, d], router [R, d], shared [1, n, d], norm [d].
StoredSite = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class StoredMept:
    """What a folder holds.

    Args:
        settings: both configuration files, the adapter's first.
        top_k: how many experts are mixed.
        tensors: the task model's own parameters, as far as the file has them.
        blocks: the site before each block, by its number; those without experts left out.
        input: the site of the text; empty where the file has none.
    """

    settings: Mapping[str, Any]
    top_k: int
    tensors: Mapping[str, Tensor]
    blocks: Mapping[int, StoredSite]
    input: StoredSite

    @property
    def length(self) -> int:
        """How many prompts an expert has."""
        for site in (self.input, *self.blocks.values()):
            if {"experts", "router"} <= site.keys():
                return len(site["experts"]) // len(site["router"])
        raise CheckpointError("there are no experts with a router")


def is_mept(directory: Path) -> bool:
    """Whether a folder says that it holds a MEPT or SMoP checkpoint."""
    adapter, training = directory / ADAPTER, directory / TRAINING
    if adapter.is_file():
        return read_json(adapter).get("peft_type") in _METHODS
    return training.is_file() and read_json(training).get("method") in _METHODS.values()


def read(directory: Path, *, top_k: int | None, allow_pickle: bool) -> StoredMept:
    """Return what a folder holds.

    Args:
        directory: `adapter_config.json` or `train_args.json`, and a state dict.
        top_k: how many experts are mixed, where the files do not say.
        allow_pickle: whether a `.bin` file may be read, weights only.

    Raises:
        OptionError: the only file is a pickle and may not be read.
        CheckpointError: files or settings are missing or not sound.
    """
    settings: dict[str, Any] = {}
    for name in (TRAINING, ADAPTER):
        if (directory / name).is_file():
            found = read_json(directory / name)
            given = {key: value for key, value in found.items() if value is not None}
            _check_types(directory / name, given)
            settings |= given
    top_k = settings.get("topk", top_k)
    if top_k is None or "stochastic" not in settings:
        raise CheckpointError(f"{directory} does not say topk, or whether it is stochastic")
    if settings.get("gumbel"):
        raise CheckpointError(f"{directory} draws random numbers for each answer (gumbel)")
    tensors: dict[str, Tensor] = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    site: dict[str, Tensor] = {}
    for name, tensor in _load(directory, allow_pickle).items():
        plain = name.removeprefix("base_model.")
        if _UNUSED.fullmatch(plain):
            continue
        if match := _BLOCK.fullmatch(plain):
            role = _ROLES[match["part"]]
            blocks.setdefault(int(match["block"]), {})[role] = _finite(name, tensor)
        elif match := _INPUT.fullmatch(plain):
            site[_ROLES[match["part"]]] = _finite(name, tensor)
        else:
            tensors[plain] = tensor.to(torch.float32)
    adapted = {block: found for block, found in blocks.items() if "experts" in found}
    return StoredMept(settings, int(top_k), tensors, dict(sorted(adapted.items())), site)


def _check_types(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what Python would take for something else: the text "false" is true."""
    for names, kind in ((_FLAGS, bool), (_NUMBERS, int), (("method",), str), (("layers",), list)):
        for name in names:
            if name in settings and type(settings[name]) is not kind:
                raise CheckpointError(
                    f"{file}: {name} is {settings[name]!r}", expected=f"a JSON {kind.__name__}"
                )


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} has NaN or infinite values: it was never initialised")
    return tensor.to(torch.float32)


def _load(directory: Path, allow_pickle: bool) -> dict[str, Tensor]:
    path = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} has no state dict", expected="pytorch_model.bin")
    if path.suffix == ".bin" and not allow_pickle:
        raise OptionError(
            f"{path} is a pickle", fix="pass allow_pickle=True if you trust where it came from"
        )
    try:
        if path.suffix == ".bin":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        else:
            loaded = safetensors.torch.load_file(path)
    except Exception as error:  # a damaged pickle raises whatever it leads to
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path} does not hold tensors by name")
    return loaded
