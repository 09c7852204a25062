"""The parity gate: nothing is published unless the engine gives the reference's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eptc.errors import ParityError
from eptc.nn import EptModel
from eptc.parity_gate.compare import FP32, Comparison
from eptc.parity_gate.outputs import Decision, check_outputs
from eptc.parity_gate.probes import Example, Probe, builtin_examples, synthetic, text_batches
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.weights import check_weights
from eptc.runtime import Engine
from eptc.tasks import Task, fill
from eptc.text import TrainingTokenizer

__all__ = ["make_probes", "prove", "refuse"]


def make_probes(
    engine: Engine, tokenizer: TrainingTokenizer | None, examples: Sequence[Example] | None
) -> tuple[list[Probe], int]:
    """Return the probes of an engine, and how many texts both tokenizers agreed on.

    Args:
        engine: the engine, for its interface and its own tokenizer.
        tokenizer: the tokenizer of training; None where there is none.
        examples: text to use; None for the built-in ones where the task has a prompt or a
            classifier's fields. Where a task only generates, its form is not known: seeded
            tokens stand alone.

    Raises:
        ParityError: the engine's tokenizer differs from the training tokenizer on a text.
    """
    manifest = engine.manifest
    task = manifest.task
    if examples is None and task is not None and task.kind != "generation":
        examples = builtin_examples(task)
    probes, agreed = [], 0
    if tokenizer is not None and examples is not None:
        for name, batch in text_batches(examples):
            feeds = engine.tokenize(batch, truncate=True)
            _check_tokenizer(tokenizer, task, batch, feeds, manifest.tokenizer)
            agreed += len(batch)
            probes.append(
                Probe(
                    name,
                    feeds["input_ids"],
                    feeds["attention_mask"],
                    feeds.get("token_type_ids"),
                )
            )
    inputs = {spec.name for graph in manifest.graphs.values() for spec in graph.inputs}
    limit = manifest.tokenizer.max_length if manifest.tokenizer is not None else None
    if manifest.generation is not None and manifest.generation.max_positions is not None:
        room = manifest.generation.max_positions - manifest.generation.max_new_tokens
        limit = max(1, min(limit or room, room))
    assert manifest.vocab_size is not None
    probes += synthetic(
        manifest.vocab_size,
        limit,
        token_types="token_type_ids" in inputs,
        left=manifest.kind == "decoder-only",
    )
    return probes, agreed


def _check_tokenizer(
    tokenizer: TrainingTokenizer,
    task: Task | None,
    examples: Sequence[Example],
    feeds: Mapping[str, Any],
    spec: Any,
) -> None:
    """Compare the engine's ids, row by row, with those of the tokenizer of training."""
    for row, example in enumerate(examples):
        limit = {"truncation": True, "max_length": spec.max_length} if spec.max_length else {}
        want = tokenizer.tokenizer(*fill(task, example), **limit)
        valid = np.asarray(feeds["attention_mask"][row], bool)
        for name in ("input_ids", "token_type_ids"):
            if name not in feeds or name not in want:
                continue
            got = feeds[name][row][valid].tolist()
            if got != list(want[name]):
                raise ParityError(
                    f"the engine's tokenizer differs from the training tokenizer on "
                    f"{fill(task, example)!r}: {name} {got[:12]}, expected {want[name][:12]}",
                    fix=f"report it with {tokenizer.folder.name}'s tokenizer files",
                )


def prove(
    directory: Path,
    engine: Engine,
    reference: EptModel,
    task_id: int,
    tokenizer: TrainingTokenizer | None,
    *,
    examples: Sequence[Example] | None = None,
    layers: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run the weight gate, the output gate and the decision gate.

    Args:
        directory: the bundle's folder.
        engine: it, loaded in ONNX Runtime.
        reference: the unfolded PyTorch model.
        task_id: position of the engine's task in the reference's list.
        tokenizer: the tokenizer of training.
        examples: texts to probe with; None for the built-in ones.
        layers: outcome of the layer gate by stage.
        progress: called with what is being done.

    Returns:
        The report; it has passed or not. `refuse` turns a failure into an error.

    Raises:
        ParityError: a weight or a tokenized text is not the reference's.
    """
    task = reference.tasks[task_id].name
    progress("parity: weights")
    files = [graph.file for graph in engine.manifest.graphs.values()]
    weights = check_weights(directory, files, reference, task_id)
    probes, tokenized = make_probes(engine, tokenizer, examples)
    tensors: list[Comparison] = []
    decisions: list[Decision] = []
    for probe in probes:
        progress(f"parity: {probe.name}")
        for outcome in check_outputs(engine, reference, task, probe, FP32):
            if isinstance(outcome, Comparison):
                tensors.append(outcome)
            else:
                decisions.append(outcome)
    return ParityReport(
        probes=tuple(
            {"name": p.name, "shape": list(p.shape), "synthetic": p.synthetic} for p in probes
        ),
        bound=FP32,
        layers=dict(layers or {}),
        weights=weights,
        tensors=tuple(tensors),
        decisions=tuple(decisions),
        tokenized=tokenized,
    )


def refuse(report: ParityReport, where: str) -> None:
    """Raise where a report has not passed.

    Args:
        report: the report.
        where: the step that is to blame, as far as it is known.

    Raises:
        ParityError: the first failure and the worst, and what would have passed.
    """
    if report.passed:
        return
    failed = [c for c in report.tensors if not c.passed]
    flipped = [d for d in report.decisions if d.flipped]
    if not failed:
        first = flipped[0]
        raise ParityError(
            f"{len(flipped)} decisions differ from the reference, first on {first.probe}, row "
            f"{first.row}, step {first.step}: the reference is sure by {first.margin:.3g}, noise "
            f"is {first.noise:.3g}",
            fix=where,
        )
    worst = report.worst
    raise ParityError(
        f"{len(failed)} of {len(report.tensors)} output tensors differ from the reference.\n"
        f"first: {failed[0].explain()}\nworst: {worst.explain()}",
        expected=f"at most {report.bound.relative:g} of the largest element ({report.bound.why}); "
        f"{report.bound.relative * worst.error / worst.bound if worst.bound else worst.error:.2g} "
        "would have passed",
        fix=where,
    )
