"""Task models without numbers: parameters that have a shape and a name and occupy no memory."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import NewGELUActivation

from eptc.architectures import Architecture, architecture, head_is_tied
from eptc.errors import BaseModelError
from eptc.ir.prompts import PromptLayout

__all__ = ["PROMPTED_LOWERINGS", "build", "canonical_parameters", "fake", "keep_torch_state"]

# By model type: what gives a model its prompts, and lowers it then.
PROMPTED_LOWERINGS = {"t5": "eptc.lower.prompted_t5", "llama": "eptc.lower.prompted_llama"}
# Rotary embeddings whose frequencies depend on the length of the input at run time.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def build(
    config: Any, *, tied_head: bool | None = None, prompts: PromptLayout | None = None
) -> torch.nn.Module:
    """Build the task model of a configuration on the meta device, in eval mode.

    Args:
        config: a transformers configuration; it is copied, never changed.
        tied_head: whether the output projection is the embedding; None: as the configuration
            says (`eptc.architectures.head_is_tied`).
        prompts: the prompts before its text, if it has any.

    Raises:
        BaseModelError: the model type is unknown, or an option cannot be lowered.
    """
    arch = architecture(config, prompted=prompts is not None)
    config = _plain(config)
    _check(config)
    tied = head_is_tied(config) if tied_head is None else tied_head
    if arch.head:
        config.tie_word_embeddings = True
    task_class = getattr(importlib.import_module(arch.module), arch.task_class)
    with torch.device("meta"):
        model: torch.nn.Module = task_class(config).eval()
        if arch.head and not tied:
            _untie(model, arch)
        if prompts is not None:
            importlib.import_module(PROMPTED_LOWERINGS[arch.model_type]).install(model, prompts)
    _recompute_buffers(model)
    _use_gelu(model)
    return model


def _plain(config: Any) -> Any:
    """Copy a configuration without the options that only change what else is returned."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    # What the base is stored as; the graphs compute in float32 whatever that is.
    config.dtype = torch.float32
    config.return_dict = True
    config.output_attentions = False
    config.output_hidden_states = False
    config.use_cache = True
    if getattr(config, "chunk_size_feed_forward", 0):
        # Chunks save memory in PyTorch and give the same numbers.
        config.chunk_size_feed_forward = 0
    return config


def _check(config: Any) -> None:
    """Refuse what would be traced as something else than it computes."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _LENGTH_DEPENDENT_ROPE:
        raise BaseModelError(
            f"the base uses the rotary embedding {rope!r}, which depends on the input's length",
            expected="a rotary embedding with fixed frequencies (default, linear, llama3, yarn)",
        )
    if not config.is_encoder_decoder and getattr(config, "is_decoder", False):
        raise BaseModelError(
            f"the base is a {config.model_type} model configured as a decoder",
            expected="an encoder (is_decoder: false)",
        )


def _untie(model: torch.nn.Module, arch: Architecture) -> None:
    head = model.get_submodule(arch.head.rpartition(".")[0])
    assert isinstance(head.weight, torch.nn.Parameter)
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight))


def _recompute_buffers(model: torch.nn.Module) -> None:
    """Give rotary embeddings their numbers; drop id tables that the graphs do not read."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == "rotary_emb":
                setattr(parent, name, type(child)(child.config))
        for name in ("position_ids", "token_type_ids"):
            parent._buffers.pop(name, None)


def _use_gelu(model: torch.nn.Module) -> None:
    """Let `gelu_new`, the same formula written out, become one operator instead of eight."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))


def fake(model: torch.nn.Module) -> FakeTensorMode:
    """Turn meta parameters into fake CPU ones, in place; tied ones stay one.

    Returns:
        The mode the fake parameters belong to; example inputs must belong to it too.
    """
    mode = FakeTensorMode()
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=torch.float32)
                    fakes[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = fakes[id(parameter)]
    return mode


def canonical_parameters(model: torch.nn.Module) -> dict[str, str]:
    """Map every name of every parameter to the first: tied parameters get one name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


@contextlib.contextmanager
def keep_torch_state() -> Iterator[None]:
    """Run with torch's defaults, then give the caller's default type and random state back."""
    dtype = torch.get_default_dtype()
    # Entered only where it is needed: a device context slows every operation down.
    on_cpu = torch.get_default_device().type == "cpu"
    device = contextlib.nullcontext() if on_cpu else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad(), device:
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
