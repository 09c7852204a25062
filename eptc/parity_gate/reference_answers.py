"""What the reference answers to labelled examples, and where it is sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc import text
from eptc.examples_file import Example
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.compare import bound_of
from eptc.runtime import Engine, Manifest
from eptc.tasks import Task, fill

__all__ = ["reference_answers"]

# What rounding moves over a whole model, relative to the largest logit: of sums in float32, and
# of weights that are stored in 16 bits (a step or two of that type). Lossy engines: `_noise`.
_NOISE = {"fp32": 2e-5, "fp16-weights": 2e-3, "bf16-weights": 1.6e-2}


def reference_answers(
    engine: Engine,
    model: ReferenceModel,
    task: Task,
    tokenizer: text.TrainingTokenizer,
    examples: Sequence[Example],
) -> tuple[list[Any], list[bool]]:
    """Return the reference's answer to each example, and whether it is sure of it."""
    want: list[Any] = []
    sure: list[bool] = []
    spec = engine.manifest.tokenizer
    limit = {"truncation": True, "max_length": spec.max_length} if spec and spec.max_length else {}
    generation = engine.manifest.generation
    noise = _noise(engine.manifest.precision)
    tokens = _label_tokens(engine.manifest, task, tokenizer)
    with torch.no_grad(), model.task(task.name):
        for example in examples:
            inputs = tokenizer.tokenizer(*fill(task, example), return_tensors="pt", **limit)
            if generation is None:
                logits = model.hf(**inputs).logits[0].numpy()
                want.append(
                    float(logits[0]) if task.kind == "regression" else int(logits.argmax())
                )
                sure.append(task.kind != "regression" and _margin(logits) > noise)
                continue
            inputs.pop("token_type_ids", None)
            index, margin = _written_label(model, engine.manifest, tokens, inputs)
            want.append(index)
            sure.append(margin > noise)
    return want, sure


def _noise(precision: str) -> float:
    """Return which margins of the reference, relative to its best score, may go either way."""
    return _NOISE.get(precision, 2 * bound_of(precision).relative)


def _label_tokens(
    manifest: Manifest, task: Task, tokenizer: text.TrainingTokenizer
) -> list[list[int]]:
    """Return each label as training wrote it, without an end.

    The released code gives a label the special tokens of a text of its own.
    """
    own = manifest.checkpoint["variant"] == "released"
    ids = [tokenizer.tokenizer.encode(label, add_special_tokens=own) for label in task.labels]
    stops = manifest.generation.eos_token_id if manifest.generation is not None else ()
    return [label[:-1] if label and label[-1] in stops else label for label in ids]


def _written_label(
    model: ReferenceModel, manifest: Manifest, labels: list[list[int]], inputs: Mapping[str, Any]
) -> tuple[int, float]:
    """Let the reference write a label; return which, and its smallest margin on the way.

    The search is transformers' own: greedy, every step constrained to what continues a label.

    Args:
        model: the reference, on its task.
        manifest: the engine's, for the special tokens.
        labels: tokens of each label.
        inputs: one text.
    """
    generation = manifest.generation
    assert generation is not None
    start = 1 if manifest.kind == "encoder-decoder" else inputs["input_ids"].shape[1]
    stops = list(generation.eos_token_id)

    def allowed(_: int, sequence: torch.Tensor) -> list[int]:
        written = sequence[start:].tolist()
        n = len(written)
        longer = {label[n] for label in labels if label[:n] == written and len(label) > n}
        ends = stops if written in labels else []
        # Nothing is left to write where the engine has no stop token.
        return sorted({*longer, *ends}) or [generation.pad_token_id]

    output = model.hf.generate(
        **inputs, max_new_tokens=1 + max(map(len, labels)), do_sample=False, num_beams=1,
        pad_token_id=generation.pad_token_id, eos_token_id=stops or None,
        prefix_allowed_tokens_fn=allowed, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    written = output.sequences[0, start:].tolist()
    found = [i for i, label in enumerate(labels) if written[: len(label)] == label]
    margins = [_margin(scores[0].numpy()) for scores in output.scores]
    return max(found, key=lambda i: len(labels[i])), min(margins)


def _margin(scores: npt.NDArray[np.float32]) -> float:
    """Return how far the best of the allowed scores leads, relative to its size."""
    best = np.sort(scores[np.isfinite(scores)])[::-1][:2]
    if len(best) < 2:
        return float("inf")
    return float((best[0] - best[1]) / max(1.0, abs(best[0])))
