"""The losses that training adds up: the task's own, and the contrastive one of the adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from eptc.nn.config import EptConfig
from eptc.tasks import Task

__all__ = ["CONTRASTIVE_WEIGHT", "combine", "contrastive_loss", "contributes", "head_loss"]

CONTRASTIVE_WEIGHT = 0.1
TEMPERATURE = 0.05
# The released T5 divides by 12 blocks of 6 linears whatever the model's depth is.
RELEASED_T5_DIVISOR = 72


def contrastive_loss(x: Tensor, embeddings: Tensor, task_id: int) -> Tensor:
    """Return the contrastive loss of one linear: its input should resemble its task's embedding.

    Cross-entropy over the cosines of each row's first position with every task embedding,
    divided by 0.05 (specs, auxiliary loss). Not detached.

    Args:
        x: the linear's input, [batch, length, in] or [batch, in].
        embeddings: every row of the linear's task embedding, [rows, in].
        task_id: the row that is the target.
    """
    first = x if x.dim() == 2 else x[:, 0]
    cosines = functional.normalize(first, dim=-1) @ functional.normalize(embeddings, dim=-1).T
    target = torch.full((len(first),), task_id, device=x.device)
    return functional.cross_entropy(cosines / TEMPERATURE, target)


def contributes(config: EptConfig, model_type: str, path: str, encoder: str | None) -> bool:
    """Whether a linear's contrastive loss is part of the total.

    Args:
        config: the checkpoint's configuration.
        model_type: the base's `model_type`.
        path: the linear's full name.
        encoder: full name of the encoder where the model has an encoder and a decoder.
    """
    if config.variant == "released" and model_type == "llama":
        return False  # the released code computes the term and never adds it
    return encoder is None or path.startswith(f"{encoder}.")


def combine(config: EptConfig, model_type: str, terms: Mapping[str, Tensor]) -> Tensor | None:
    """Return the contrastive loss of a model from its linears' terms, None without terms."""
    if not terms:
        return None
    total = torch.stack(list(terms.values())).sum()
    fixed = config.variant == "released" and model_type == "t5"
    return total / (RELEASED_T5_DIVISOR if fixed else len(terms))


def head_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Return an encoder classifier's loss: mean squared error for regression, else cross-entropy.

    Args:
        task: the task.
        logits: [batch, outputs].
        labels: [batch].
    """
    if task.kind == "regression":
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels)
