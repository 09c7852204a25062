"""BERT, RoBERTa and DeBERTa: the graph's logits are the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

# Logits are below 10; float32 sums in another order differ by 1e-6 of that.
ATOL = 2e-5


def feeds(
    config: Any, rng: np.random.Generator, batch: int, length: int, padding: str
) -> dict[str, np.ndarray]:
    ids = rng.integers(5, config.vocab_size, (batch, length))
    mask = np.ones_like(ids)
    for row in range(batch if padding != "none" else 0):
        hidden = row % length
        mask[row, length - hidden :] = 0
        if padding == "left":
            mask[row] = mask[row, ::-1]
    ids[mask == 0] = config.pad_token_id
    result = {"input_ids": ids, "attention_mask": mask}
    if config.type_vocab_size > 1:
        result["token_type_ids"] = rng.integers(0, config.type_vocab_size, (batch, length))
    return result


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "roberta",
        "deberta",
        "deberta-own-keys",
        "deberta-no-buckets",
        "deberta-to-position",
        "deberta-from-position",
        "deberta-absolute",
        "deberta-convolution",
        "deberta-narrow-embedding",
    ],
)
def test_logits(
    lowered: Callable[[str], Any],
    rng: np.random.Generator,
    name: str,
    batch: int,
    length: int,
    padding: str,
) -> None:
    model = lowered(name)
    given = feeds(model.config, rng, batch, length, padding)
    with torch.no_grad():
        wanted = model.reference(**{k: torch.from_numpy(v) for k, v in given.items()}).logits
    found = model.run("model", given)["logits"]
    assert found.shape == (batch, model.config.num_labels)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("bert", ["input_ids", "attention_mask", "token_type_ids"]),
        ("roberta", ["input_ids", "attention_mask"]),
    ],
)
def test_interface(lowered: Callable[[str], Any], name: str, inputs: list[str]) -> None:
    session = lowered(name).sessions["model"]
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
        (name, ["batch", "sequence"], "tensor(int64)") for name in inputs
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 3])]
