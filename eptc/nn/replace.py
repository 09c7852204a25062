"""Put a checkpoint's own parameters in the place of the base's: heads, biases, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eptc.errors import CheckpointError

__all__ = ["replace_parameters"]


def replace_parameters(hf_model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters of a Hugging Face model, in place; shapes may grow or shrink.

    Modules that share a parameter share the new one. The model's configuration learns of another
    number of labels or tokens.

    Args:
        hf_model: the model; its other parameters may be on the meta device.
        tensors: by the names of parameters of the model.

    Raises:
        CheckpointError: the model has no such parameter, or it has another number of axes.
    """
    named = dict(hf_model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in named or named[name].dim() != tensor.dim():
            raise CheckpointError(
                f"the model has no place for {name} {list(tensor.shape)}",
                expected="a parameter of the base's task model",
            )
        old, new = named[name], nn.Parameter(tensor.clone(), requires_grad=False)
        for other, parameter in named.items():
            if parameter is old:
                path, _, attribute = other.rpartition(".")
                module = hf_model.get_submodule(path)
                module._parameters[attribute] = new
                _resize(module, attribute, new)
                named[other] = new
    embeddings = hf_model.get_input_embeddings()
    hf_model.config.vocab_size = int(embeddings.weight.shape[0])
    rows = [t.shape[0] for n, t in tensors.items() if n.startswith(("classifier.", "score."))]
    if rows and type(hf_model).__name__.endswith("ForSequenceClassification"):
        head = getattr(hf_model, "classifier", getattr(hf_model, "score", None))
        last = [m for m in head.modules() if isinstance(m, nn.Linear)][-1]  # type: ignore[union-attr]
        hf_model.config.num_labels = hf_model.num_labels = last.out_features


def _resize(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
    if attribute != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = parameter.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = parameter.shape[0]
