"""The output gate of a folder for onnxruntime-genai: its greedy text beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from eptc.errors import ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.compare import FP32, bound_of, compare
from eptc.parity_gate.gate import refuse, with_outcomes
from eptc.parity_gate.outputs import decide
from eptc.parity_gate.probes import Probe, builtin_examples
from eptc.parity_gate.report import ParityReport
from eptc.tasks import Task, fill
from eptc.text import TrainingTokenizer

__all__ = ["Run", "prove_genai"]

# Of each probe one row is continued by so many tokens.
_TOKENS, _PROBES = 8, 8

Run = Callable[[Sequence[Sequence[int]], int, Sequence[str]], Mapping[str, Any]]
"""Ids, how many to write, texts -> `tokens.{i}` [n], `logits.{i}` [n, vocabulary], `ids.{i}`."""


def prove_genai(
    reference: ReferenceModel,
    task: Task,
    probes: Sequence[Probe],
    run: Run,
    tokenizer: TrainingTokenizer | None,
    *,
    precision: str,
) -> dict[str, Any]:
    """Compare what onnxruntime-genai writes with the reference; return what was found, as JSON.

    The reference is given the tokens that were written, and must have chosen each, unless it was
    near to another; the logits that each was chosen by are compared as well.

    Args:
        reference: the unfolded model.
        task: the task, by its own list.
        probes: batches; the first row of each is continued.
        run: runs the folder.
        tokenizer: of training: how many texts the folder's makes the same tokens of is counted.
        precision: what its weights are stored as.

    Raises:
        ParityError: it does not write what the reference does.
    """
    rows = [row for probe in probes if (row := _row(probe))]
    # Text first: with fewer bits that is what is bounded.
    chosen = sorted(zip(rows, probes, strict=True), key=lambda pair: pair[1].synthetic)[:_PROBES]
    texts = [] if tokenizer is None else [" ".join(fill(task, e)) for e in builtin_examples(task)]
    found = run([row for row, _ in chosen], _TOKENS, texts)
    bound = bound_of(precision)
    text = any(not probe.synthetic for _, probe in chosen)
    report = ParityReport((), bound, {}, 0.0, (), (), 0)
    for number, (row, probe) in enumerate(chosen):
        tokens, got = found[f"tokens.{number}"], found[f"logits.{number}"]
        if not len(tokens):
            raise ParityError(f"onnxruntime-genai writes nothing after {probe.name}")
        want = _expected(reference, task, [*row, *tokens[:-1].tolist()], len(tokens))
        loose = bound != FP32 and text and probe.synthetic
        compared = compare(
            f"logits, {probe.name}", got, want, bound.without_text if loose else bound
        )
        decisions = [
            decide(probe.name, 0, step, got[step], want[step], 2 * compared.bound)
            for step in range(len(tokens))
        ]
        written = [int(row.argmax()) for row in got]
        if written != tokens.tolist():
            raise ParityError(
                f"onnxruntime-genai writes {tokens.tolist()} after {probe.name}",
                expected=f"{written}, the largest of its own logits",
                fix="see whether genai_config.json asks for anything but greedy text",
            )
        report = with_outcomes(report, probe, [compared, *decisions])
    refuse(report, "the folder that the model builder was given is right: report it to the "
           "authors of onnxruntime-genai, or try another version of it")  # fmt: skip
    summary = report.summary()
    kept = ("tensors", "largest_error", "its_bound", "decisions", "flips", "ties", "text_probes",
            "synthetic_probes")  # fmt: skip
    equal = [
        found[f"ids.{number}"].tolist() == tokenizer.tokenizer(text)["input_ids"]
        for number, text in enumerate(texts)
        if tokenizer is not None
    ]
    tokenized = {"texts": len(equal), "texts_tokenized_equally": sum(equal)}
    return {**{key: summary[key] for key in kept}, **tokenized}


def _row(probe: Probe) -> list[int]:
    """Return the first row's tokens, without padding."""
    ids: list[int] = probe.input_ids[0][probe.attention_mask[0].astype(bool)].tolist()
    return ids


def _expected(
    reference: ReferenceModel, task: Task, ids: Sequence[int], last: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the reference's logits [last, vocabulary] after the last tokens of a sequence."""
    with torch.no_grad(), reference.task(task.name):
        logits = reference.hf(input_ids=torch.tensor([ids]), use_cache=False).logits
    found: np.ndarray[Any, np.dtype[np.float32]] = logits[0, -last:].numpy()
    return found
