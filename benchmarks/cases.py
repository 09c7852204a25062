"""What is measured: models, shapes and modes. Imported in every environment."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import numpy as np

from benchmarks.places import Files

__all__ = ["CASES", "TRIAL", "Case", "Mode", "feeds"]

Mode = Literal["classify", "encode", "generate"]
# How the names of cases begin that try the suite itself; they run when asked for.
TRIAL = "tiny"


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of work for one model.

    Args:
        name: unique; starts with the model's name.
        model: a name in `models.MODELS`.
        mode: `classify`: ids to logits. `encode`: an encoder-decoder's encoder alone, ids to its
            last hidden state. `generate`: greedy decoding, ids to new ids.
        batch: rows.
        length: tokens a row, none of them padding.
        new_tokens: tokens written a row (`generate`).
        rounds: rounds that are counted.
        precision: the engine's; below `fp32` it is compared with the float32 engine and PyTorch.
    """

    name: str
    model: str
    mode: Mode
    batch: int
    length: int
    new_tokens: int = 0
    rounds: int = 30
    precision: Literal["fp32", "int8", "int4"] = "fp32"

    @property
    def lossy(self) -> bool:
        """Whether the engine's answers may differ beyond rounding."""
        return self.precision != "fp32"


CASES = (
    Case("minilm-b1-s32", "minilm", "classify", 1, 32),
    Case("minilm-b1-s128", "minilm", "classify", 1, 128),
    Case("minilm-b8-s128", "minilm", "classify", 8, 128),
    Case("t5-base-encoder-b1-s128", "t5-base", "encode", 1, 128),
    Case("t5-base-encoder-b8-s32", "t5-base", "encode", 8, 32),
    Case("t5-base-first-token-b1-s128", "t5-base", "generate", 1, 128, 1),
    Case("t5-base-first-token-b8-s32", "t5-base", "generate", 8, 32, 1),
    Case("t5-base-2-tokens", "t5-base", "generate", 1, 32, 2),
    Case("t5-base-16-tokens", "t5-base", "generate", 1, 32, 16),
    Case("smollm2-64-tokens", "smollm2", "generate", 1, 32, 64, rounds=20),
    Case("int8-minilm-b1-s32", "minilm", "classify", 1, 32, precision="int8"),
    Case("int8-minilm-b1-s128", "minilm", "classify", 1, 128, precision="int8"),
    Case("int8-minilm-b8-s128", "minilm", "classify", 8, 128, precision="int8"),
    Case("int8-t5-base-2-tokens", "t5-base", "generate", 1, 32, 2, precision="int8"),
    Case("int8-smollm2-64-tokens", "smollm2", "generate", 1, 32, 64, 20, "int8"),
    Case("int4-smollm2-64-tokens", "smollm2", "generate", 1, 32, 64, 20, "int4"),
    Case("tiny-bert", "tiny-bert", "classify", 2, 8, rounds=6),
    Case("tiny-t5", "tiny-t5", "generate", 1, 8, 3, rounds=6),
    Case("tiny-llama", "tiny-llama", "generate", 1, 8, 3, rounds=6),
)


def feeds(case: Case, files: Files, seed: int = 0) -> dict[str, Any]:
    """Return token ids drawn at random, and a mask of ones: int64 [batch, length]."""
    config = json.loads((files.base / "config.json").read_text())
    vocabulary = int(config["vocab_size"])
    # The first ids are special tokens in every model here.
    low = min(1000, vocabulary // 2)
    ids = np.random.default_rng(seed).integers(low, vocabulary, (case.batch, case.length))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if config["model_type"] == "bert":
        arrays["token_type_ids"] = np.zeros_like(ids)
    return arrays
