"""What the reference answers to labelled examples, by PyTorch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from eptc import text
from eptc.examples_file import Example
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.answers import Answers, from_logs
from eptc.runtime import Manifest
from eptc.tasks import Task, fill

__all__ = ["reference_answers"]

_Inputs = Mapping[str, torch.Tensor]


def reference_answers(
    manifest: Manifest,
    model: ReferenceModel,
    task: Task,
    tokenizer: text.TrainingTokenizer,
    examples: Sequence[Example],
) -> Answers:
    """Return what the unfolded model answers to labelled examples, one text at a time.

    Args:
        manifest: the engine's, for lengths and special tokens.
        model: the unfolded model.
        task: the task.
        tokenizer: the tokenizer of training.
        examples: cut as in training where they are too long.
    """
    chosen: list[Any] = []
    scores: list[torch.Tensor] = []
    close: set[int] = set()
    spec = manifest.tokenizer
    limit = {"truncation": True, "max_length": spec.max_length} if spec and spec.max_length else {}
    labels = _label_tokens(manifest, task, tokenizer)
    regression = task.kind == "regression"
    with torch.no_grad(), model.task(task.name):
        for row, example in enumerate(examples):
            inputs = tokenizer.tokenizer(*fill(task, example), return_tensors="pt", **limit)
            with model.undecided() as undecided:
                if manifest.generation is None:
                    logits = model.hf(**inputs).logits[0].double()
                    chosen.append(float(logits[0]) if regression else int(logits.argmax()))
                    scores.append(logits[:1] if regression else logits.log_softmax(-1))
                else:
                    inputs.pop("token_type_ids", None)
                    chosen.append(_written_label(model, manifest, labels, inputs))
                    scores.append(_likelihoods(model, manifest, labels, inputs).log_softmax(-1))
            if undecided.rows:
                close.add(row)
    found = np.stack([row.numpy() for row in scores])
    answers = Answers(chosen, found) if regression else from_logs(chosen, found)
    return dataclasses.replace(answers, undecided=frozenset(close))


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
    model: ReferenceModel, manifest: Manifest, labels: list[list[int]], inputs: _Inputs
) -> int:
    """Let the reference write a label; return which.

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
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    written = output[0, start:].tolist()
    found = [i for i, label in enumerate(labels) if written[: len(label)] == label]
    return max(found, key=lambda i: len(labels[i]))


def _likelihoods(
    model: ReferenceModel, manifest: Manifest, labels: list[list[int]], inputs: _Inputs
) -> torch.Tensor:
    """Return the log-likelihood of each label as a whole, its end included where one was taught.

    Arguments as for `_written_label`.
    """
    generation, count = manifest.generation, len(labels)
    assert generation is not None
    fed = torch.full((count, max(map(len, labels))), generation.pad_token_id)
    for row, label in enumerate(labels):
        fed[row, : len(label)] = torch.tensor(label)
    mask = inputs["attention_mask"].expand(count, -1)
    if manifest.kind == "encoder-decoder":
        assert generation.decoder_start_token_id is not None
        states = model.hf.get_encoder()(**inputs)
        states.last_hidden_state = states.last_hidden_state.expand(count, -1, -1)
        first = torch.full((count, 1), generation.decoder_start_token_id)
        logits = model.hf(
            encoder_outputs=states, attention_mask=mask,
            decoder_input_ids=torch.cat([first, fed], dim=1),
        ).logits  # fmt: skip
    else:
        prompt = model.hf(**inputs, use_cache=True)
        cache = prompt.past_key_values
        cache.batch_repeat_interleave(count)
        following = model.hf(
            input_ids=fed, attention_mask=torch.cat([mask, torch.ones_like(fed)], dim=1),
            past_key_values=cache,
        ).logits  # fmt: skip
        logits = torch.cat([prompt.logits[:, -1:].expand(count, -1, -1), following], dim=1)
    logs = logits.double().log_softmax(-1)
    # The released code masks the end of a Llama's answers.
    taught = manifest.kind == "encoder-decoder" or manifest.checkpoint["variant"] != "released"
    stops = list(generation.eos_token_id) if taught else []
    totals = []
    for row, label in enumerate(labels):
        total = sum((logs[row, at, token] for at, token in enumerate(label)), logs.new_zeros(()))
        end = logs[row, len(label), stops].logsumexp(0) if stops else 0
        totals.append(total + end)
    return torch.stack(totals)
