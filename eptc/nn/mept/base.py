"""The task model below the prompts, with the weights that the checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eptc.errors import BaseModelError, CheckpointError
from eptc.nn.base import refusing
from eptc.nn.stored import name_some

__all__ = ["task_model"]

_EMBEDDINGS = {"t5": "shared.weight", "llama": "model.embed_tokens.weight"}
# T5's, where a file has the embedding under them too.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def task_model(base_dir: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
    """Return the plain task model: float32, eval mode, eager attention.

    Args:
        base_dir: the base's folder: its configuration, and the weights that `tensors` lacks.
        tensors: parameters by their names in the task model.
        settings: the checkpoint's, for the size of the vocabulary where the embedding is missing.

    Raises:
        BaseModelError: the folder cannot be used, or is of another model type.
        CheckpointError: weights are missing, left over, or of another shape.
    """
    import transformers

    with refusing(base_dir):
        config = transformers.AutoConfig.from_pretrained(base_dir, local_files_only=True)
    if config.model_type not in _EMBEDDINGS:
        raise BaseModelError(
            f"the base's model type is {config.model_type!r}", expected="t5 or llama"
        )
    embedding, seq2seq = _EMBEDDINGS[config.model_type], config.model_type == "t5"
    task_class = (
        transformers.T5ForConditionalGeneration
        if seq2seq
        else transformers.LlamaForSequenceClassification
    )
    state = dict(tensors)
    if embedding not in state:
        state = _stored(task_class, base_dir, embedding, settings) | state
    for alias in _ALIASES:
        state.pop(alias, None)
    config.vocab_size = len(state[embedding])
    config._attn_implementation = "eager"
    config.dtype = torch.float32
    with refusing(base_dir):
        if seq2seq:
            model = task_class(config)
            head = state.setdefault("lm_head.weight", state[embedding])
            if not torch.equal(head, state[embedding]):
                # Built from a configuration every T5 is tied: filling the head would
                # overwrite the embedding.
                model.lm_head.weight = torch.nn.Parameter(torch.empty_like(head))
        else:
            state.pop("lm_head.weight", None)
            config.num_labels = len(state.get("score.weight", ()))
            model = task_class(config)
    _fill(model, state)
    return model.eval().requires_grad_(False)


def _stored(
    task_class: Any, base_dir: Path, embedding: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the base's own weights, the vocabulary cut as training cut it."""
    with refusing(base_dir):
        model = task_class.from_pretrained(
            base_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    state = dict(model.state_dict())
    found = len(state[embedding])
    rows = int(settings.get("tokenizer_length") or found)
    if rows > found:
        raise CheckpointError(
            f"training added {rows - found} rows to the embedding, which only the full state "
            "dict holds"
        )
    for name in (embedding, "lm_head.weight", *_ALIASES):
        if name in state:
            state[name] = state[name][:rows]
    return state


def _fill(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = set(_ALIASES)
    if missing := sorted(wanted - set(state) - tied):
        raise CheckpointError(f"there are no weights for {name_some(missing)}")
    if extra := sorted(set(state) - wanted):
        raise CheckpointError(f"there is no place for the weights {name_some(extra)}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the base's configuration: {error}"
        ) from error
