"""Trace a configuration into ONNX graphs without weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from eptc.architectures import architecture

if TYPE_CHECKING:
    from eptc.architectures import Kind

__all__ = ["expected_parameters", "trace"]

_LOWERINGS: dict[Kind, str] = {
    "encoder-classifier": "eptc.lower.encoder_classifier",
    "encoder-decoder": "eptc.lower.encoder_decoder",
    "decoder-only": "eptc.lower.decoder_only",
}


def expected_parameters(
    config: Any, *, tied_head: bool | None = None
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the task model, tied ones once.

    Args:
        config: a transformers configuration.
        tied_head: whether the output projection is the embedding; None: as the configuration
            says (`eptc.architectures.head_is_tied`).

    Raises:
        BaseModelError: the model type or one of its options is not supported.
    """
    from eptc.lower.skeleton import build, keep_torch_state

    with keep_torch_state():
        model = build(config, tied_head=tied_head)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def trace(config: Any, *, opset: int = 20, tied_head: bool | None = None) -> dict[str, ir.Model]:
    """Trace the task model of a configuration; no weight is needed, none is allocated.

    Args:
        config: a transformers configuration; `num_labels` is a classifier's.
        opset: version of the ONNX operators.
        tied_head: as for `expected_parameters`.

    Returns:
        `{"model": ...}`, or `{"encoder": ..., "decoder": ...}` for an encoder-decoder. The
        weights are initializers without data, named by canonical parameter. The same
        configuration gives the same graphs to the byte, whatever the process did before.

    Raises:
        BaseModelError: the model type or one of its options is not supported.
    """
    from eptc.lower.attention import traced_attention
    from eptc.lower.export import export
    from eptc.lower.skeleton import build, canonical_parameters, fake, keep_torch_state

    lowering = importlib.import_module(_LOWERINGS[architecture(config).kind])
    with keep_torch_state():
        model = build(config, tied_head=tied_head)
        parameters = canonical_parameters(model)
        mode = fake(model)
        with traced_attention(model):
            return {
                name: export(spec, mode, parameters, opset)
                for name, spec in lowering.graphs(model).items()
            }
