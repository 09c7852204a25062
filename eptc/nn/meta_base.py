"""A base model that is in memory one part at a time: its parameters come and go by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eptc.errors import BaseModelError
from eptc.nn.base import refusing, task_class
from eptc.nn.shards import Shards

__all__ = ["MetaBase"]

# What the first releases called a norm's weight and bias.
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


class MetaBase:
    """A Hugging Face model whose parameters are on the meta device until they are asked for.

    Args:
        directory: a Hugging Face model folder with safetensors weights.

    Attributes:
        hf: the model: float32, eval mode, eager attention. Its modules may be moved and wrapped.
        stored: of each parameter that the folder has a weight for, by the name it has at first,
            which stored tensor that is; tied parameters are the same one.
        missing: names of the parameters the folder has no weights for, sorted.

    Raises:
        BaseModelError: the folder cannot be used, or a weight has another shape than the model's.
    """

    def __init__(self, directory: Path) -> None:
        self._shards = Shards(directory)
        with refusing(directory):
            auto, config = task_class(directory)
            with torch.device("meta"):
                self.hf: Any = auto.from_config(
                    config, dtype=torch.float32, attn_implementation="eager"
                )
            self.hf.eval()
            _read_generation_config(self.hf, directory)
            _fill_buffers(self.hf)
        self._places: dict[nn.Module, dict[str, str]] = {}
        self.stored: dict[str, str] = {}
        self.missing = self._find_places(directory)

    def _find_places(self, directory: Path) -> list[str]:
        """Say which stored tensor each parameter is; return the names of those without one."""
        parameters = dict(self.hf.named_parameters(remove_duplicate=False))
        found = _by_parameter(self._shards.tensors, parameters, self.hf.base_model_prefix)
        _tie(found, self.hf.all_tied_weights_keys)
        for name, stored in found.items():
            shape = self._shards.tensors[stored].shape
            if shape != tuple(parameters[name].shape):
                raise BaseModelError(
                    f"{directory} cannot be loaded: {stored} has the shape {list(shape)}",
                    expected=str(list(parameters[name].shape)),
                )
        for path, module in self.hf.named_modules():
            for attribute in module._parameters:
                name = f"{path}.{attribute}" if path else attribute
                if name in found:
                    self._places.setdefault(module, {})[attribute] = found[name]
        self.stored = found
        return sorted(parameters.keys() - found.keys())

    def dtype(self, name: str) -> str:
        """Return the type in which a parameter is stored, as torch spells it."""
        return str(self._shards.dtype(self.stored[name])).removeprefix("torch.")

    @contextlib.contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Have the parameters of a module, and of those in it, in memory for a while.

        What is in memory already stays there.

        Raises:
            BaseModelError: a weight cannot be read.
        """
        absent = list(_on_meta(module))
        try:
            for owner, attribute, parameter in absent:
                owner._parameters[attribute] = _frozen(self._read(owner, attribute, parameter))
            yield
        finally:
            for owner, attribute, parameter in absent:
                owner._parameters[attribute] = parameter

    def keep(self, module: nn.Module) -> None:
        """Load the parameters of a module for good; those the folder does not have are zeros."""
        for owner, attribute, parameter in _on_meta(module):
            owner._parameters[attribute] = _frozen(self._read(owner, attribute, parameter))

    def _read(self, owner: nn.Module, attribute: str, parameter: nn.Parameter) -> Tensor:
        place = self._places.get(owner, {}).get(attribute)
        if place is None:
            return torch.zeros(parameter.shape)
        return self._shards.read(place)


def _on_meta(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in list(module.modules()):
        for attribute, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                yield owner, attribute, parameter


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _by_parameter(
    stored: Mapping[str, Any], parameters: Mapping[str, Any], prefix: str
) -> dict[str, str]:
    """Return the stored name of each parameter: the model's own, or that of a model around it."""
    found: dict[str, str] = {}
    for name in stored:
        plain = name
        for old, new in _OLD_NAMES:
            if plain.endswith(old):
                plain = plain.removesuffix(old) + new
        for candidate in (plain, f"{prefix}.{plain}", plain.removeprefix(f"{prefix}.")):
            if candidate in parameters:
                found.setdefault(candidate, name)
                break
    return found


def _tie(found: dict[str, str], tied: Mapping[str, str]) -> None:
    """Let parameters that are tied and not stored themselves be what is stored of the others."""
    for source in set(tied.values()):
        group = [source, *(target for target, other in tied.items() if other == source)]
        stored = [found[name] for name in group if name in found]
        if stored:
            for name in group:
                found.setdefault(name, stored[0])


def _read_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (directory / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        model.generation_config = config


def _fill_buffers(model: Any) -> None:
    """Compute the buffers, which follow from the configuration, as transformers does."""
    for module in list(model.modules()):
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            model._init_weights(module)
