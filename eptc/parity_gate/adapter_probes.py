"""What an adapter is compared on: seeded tokens, and text where there is a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.architectures import Kind
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.compare import FP32, Bound
from eptc.parity_gate.interface import position_limit
from eptc.parity_gate.outputs import Decision, decide
from eptc.parity_gate.probes import Example, Probe, builtin_examples, synthetic, text_batches
from eptc.tasks import Task, fill
from eptc.text import TrainingTokenizer

__all__ = ["adapter_probes", "choices", "logits"]

# Tokens a decoder is fed where a probe has none for it.
_FED = 8


def adapter_probes(
    reference: ReferenceModel,
    task: Task,
    kind: Kind,
    tokenizer: TrainingTokenizer | None,
    examples: Sequence[Example] | None = None,
) -> list[Probe]:
    """Return the probes of an adapter, or of a folded model.

    Args:
        reference: the unfolded model, for its vocabulary and its limits.
        task: the task, for the form of its text; where it only generates that is not known.
        kind: of model.
        tokenizer: the tokenizer of training; None where there is none.
        examples: texts; None for the built-in ones.
    """
    config, limit = reference.hf.config, position_limit(reference)
    types = int(getattr(config, "type_vocab_size", 0) or 0) if kind == "encoder-classifier" else 0
    found = synthetic(
        int(config.vocab_size), limit, token_types=types, left=kind == "decoder-only",
        answers=_start(reference) if kind == "encoder-decoder" else None,
    )  # fmt: skip
    if tokenizer is None or (examples is None and task.kind == "generation"):
        return found
    limits = [n for n in (task.max_length, limit) if n is not None]
    for name, batch in text_batches(examples or builtin_examples(task)):
        rows = [
            tokenizer.tokenizer(
                *fill(task, example), truncation=bool(limits), max_length=min(limits, default=None)
            )
            for example in batch
        ]
        found.append(_padded(name, rows, kind, types > 0))
    return found


def _padded(name: str, rows: list[Any], kind: Kind, types: bool) -> Probe:
    """Return a batch of tokenized texts; padding is masked, so that any token will do."""
    longest = max(len(row["input_ids"]) for row in rows)

    def array(key: str) -> npt.NDArray[np.int64]:
        filled = np.zeros((len(rows), longest), np.int64)
        for into, row in zip(filled, rows, strict=True):
            values = row.get(key, [0] * len(row["input_ids"]))
            place = slice(-len(values), None) if kind == "decoder-only" else slice(len(values))
            into[place] = values
        return filled

    ids, mask = array("input_ids"), array("attention_mask")
    return Probe(name, ids, mask, array("token_type_ids") if types else None)


def _start(reference: ReferenceModel) -> int:
    for config in (reference.hf.generation_config, reference.hf.config):
        for key in ("decoder_start_token_id", "pad_token_id"):
            if (token := getattr(config, key, None)) is not None:
                return int(token)
    return 0


def logits(model: Any, probe: Probe, kind: Kind) -> npt.NDArray[np.float32]:
    """Return a model's logits, zero where the input is padding.

    Args:
        model: the Hugging Face model, its task active.
        probe: the batch.
        kind: of model.
    """
    inputs = {name: torch.from_numpy(array) for name, array in probe.feeds().items()}
    if kind == "decoder-only":
        positions = inputs["attention_mask"].cumsum(1) - 1
        found = model(**inputs, position_ids=positions.clamp(min=0), use_cache=False).logits
        found = found * inputs["attention_mask"][..., None]
    elif kind == "encoder-decoder":
        fed = probe.input_ids[:, :_FED] if probe.answer is None else probe.answer
        found = model(
            **inputs, decoder_input_ids=torch.from_numpy(np.ascontiguousarray(fed))
        ).logits
    else:
        found = model(**inputs).logits
    array: npt.NDArray[np.float32] = found.numpy()
    return array


def choices(probe: str, got: Any, want: Any, kind: Kind, bound: Bound = FP32) -> list[Decision]:
    """Return the labels, or the tokens after a sequence, that both sides choose.

    Args:
        probe: name of the batch.
        got: logits of what is proven.
        want: the reference's.
        kind: of model.
        bound: what float32 may move logits by; margins up to twice that may go either way.
    """
    if want.shape[-1] < 2:
        return []
    if kind != "encoder-classifier":
        got, want = got[:, -1], want[:, -1]
    noise = 2 * float(bound.absolute(np.abs(want).max()))
    return [decide(probe, row, 0, got[row], want[row], noise) for row in range(len(want))]
