"""Trace a configuration into ONNX graphs without weights."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from eptc.architectures import architecture

if TYPE_CHECKING:
    import torch

    from eptc.architectures import Architecture, Kind
    from eptc.ir.prompts import PromptLayout
    from eptc.lower.repeat import Stack

__all__ = ["expected_parameters", "trace"]

_LOWERINGS: dict[Kind, str] = {
    "encoder-classifier": "eptc.lower.encoder_classifier",
    "encoder-decoder": "eptc.lower.encoder_decoder",
    "decoder-only": "eptc.lower.decoder_only",
}


def expected_parameters(
    config: Any, *, tied_head: bool | None = None, prompts: PromptLayout | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the task model, tied ones once.

    Args:
        config: a transformers configuration.
        tied_head: whether the output projection is the embedding; None: as the configuration
            says (`eptc.architectures.head_is_tied`).
        prompts: the prompts before the text, if there are any; theirs are named too.

    Raises:
        BaseModelError: the model type or one of its options is not supported.
    """
    from eptc.lower.skeleton import build, keep_torch_state

    with keep_torch_state():
        model = build(config, tied_head=tied_head, prompts=prompts)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def trace(
    config: Any,
    *,
    opset: int = 20,
    tied_head: bool | None = None,
    prompts: PromptLayout | None = None,
) -> dict[str, ir.Model]:
    """Trace the task model of a configuration; no weight is needed, none is allocated.

    Args:
        config: a transformers configuration; `num_labels` is a classifier's.
        opset: version of the ONNX operators.
        tied_head: as for `expected_parameters`.
        prompts: likewise.

    Returns:
        `{"model": ...}`, or `{"encoder": ..., "decoder": ...}` for an encoder-decoder. The
        weights are initializers without data, named by canonical parameter. The same
        configuration gives the same graphs to the byte, whatever the process did before.

    Raises:
        BaseModelError: the model type or one of its options is not supported.
    """
    from eptc.lower.repeat import UnlikeBlocksError, shortened
    from eptc.lower.skeleton import build, keep_torch_state

    arch = architecture(config, prompted=prompts is not None)
    make = functools.partial(build, tied_head=tied_head)
    with keep_torch_state():
        model = make(config, prompts=prompts)
        short = shortened(model, config, arch, make, prompts)
        if short is not None:
            with contextlib.suppress(UnlikeBlocksError):
                return _trace(short.model, arch, opset, prompts, (model, short.stacks))
        return _trace(model, arch, opset, prompts)


def _trace(
    model: torch.nn.Module,
    arch: Architecture,
    opset: int,
    prompts: PromptLayout | None,
    whole: tuple[torch.nn.Module, Mapping[str, Stack]] | None = None,
) -> dict[str, ir.Model]:
    """Trace a model on the meta device, and grow its graphs to those of the whole model."""
    from eptc.lower.attention import traced_attention
    from eptc.lower.export import export
    from eptc.lower.repeat import grow
    from eptc.lower.skeleton import PROMPTED_LOWERINGS, canonical_parameters, fake

    lowering = importlib.import_module(
        _LOWERINGS[arch.kind] if prompts is None else PROMPTED_LOWERINGS[arch.model_type]
    )
    specs = lowering.graphs(whole[0]) if whole is not None else {}
    parameters = canonical_parameters(model)
    mode = fake(model)
    graphs = {}
    with traced_attention(model):
        for name, spec in lowering.graphs(model).items():
            if whole is None:
                graphs[name] = export(spec, mode, parameters, opset)
                continue
            grown = functools.partial(grow, stacks=whole[1], spec=specs[name])
            graphs[name] = export(spec, mode, parameters, opset, grown)
    return graphs
