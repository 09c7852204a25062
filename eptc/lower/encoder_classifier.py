"""The graph of an encoder with a classification head: BERT, RoBERTa, DeBERTa-v2 and v3."""

from __future__ import annotations

from typing import Any

import torch

from eptc.lower.attention import padding_mask
from eptc.lower.disentangled import use_disentangled
from eptc.lower.graph_spec import GraphSpec, Port, ids

__all__ = ["graphs"]


def graphs(model: Any) -> dict[str, GraphSpec]:
    """Return the graph `model`: ids and mask [batch, sequence] -> logits [batch, labels].

    `token_type_ids` is an input only where the model knows more than one type.
    """
    config = model.config
    if config.model_type == "deberta-v2":
        use_disentangled(model)
    names = ["input_ids", "attention_mask"]
    if config.type_vocab_size > 1:
        names.append("token_type_ids")
    logits = Port("logits", ("batch", config.num_labels))
    spec = GraphSpec(_Classifier(model), tuple(ids(name) for name in names), (logits,))
    return {"model": spec}


class _Classifier(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # RoBERTa counts positions from the padding and does so itself; BERT counts from 0.
        self.counts_positions = model.config.model_type != "roberta"
        # DeBERTa reads the mask itself, as zeros and ones, and hides padded queries too.
        self.reads_mask = model.config.model_type == "deberta-v2"

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        positions = None
        if self.counts_positions:
            positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        if token_type_ids is None:
            # One row for all: [1, 1] is broadcast where [batch, sequence] would be gathered.
            token_type_ids = torch.zeros(1, 1, dtype=torch.int64)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask if self.reads_mask else padding_mask(attention_mask),
            token_type_ids=token_type_ids,
            position_ids=positions,
        )
        logits: torch.Tensor = output.logits
        return logits
