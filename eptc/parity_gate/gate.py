"""The parity gate: nothing is published unless the engine gives the reference's answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eptc.errors import InputError, InternalError, ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.compare import FP32, Bound, Comparison, bound_of, not_run
from eptc.parity_gate.interface import (
    Tokenizes,
    check_layout,
    check_manifest,
    check_text,
    position_limit,
)
from eptc.parity_gate.outputs import Decision, check_outputs
from eptc.parity_gate.probes import (
    Example,
    Probe,
    builtin_examples,
    odd_examples,
    synthetic,
    text_batches,
)
from eptc.parity_gate.report import ParityReport, furthest
from eptc.parity_gate.weights import check_weights
from eptc.runtime import Engine
from eptc.text import TrainingTokenizer

__all__ = [
    "make_probes", "prove", "prove_outputs", "refuse", "run_probes", "with_outcomes",
]  # fmt: skip


def make_probes(
    engine: Tokenizes,
    reference: ReferenceModel,
    task_id: int,
    tokenizer: TrainingTokenizer | None,
    examples: Sequence[Example] | None,
) -> tuple[list[Probe], int]:
    """Return the probes of an engine, and how many texts both tokenizers agreed on.

    Args:
        engine: the engine, or its bundle, for its own tokenizer.
        reference: the unfolded model, for its vocabulary and its limits.
        task_id: position of the engine's task in the reference's list.
        tokenizer: the tokenizer of training; None where there is none.
        examples: text to use; None for the built-in ones. Where a task only generates, the form
            of its text is not known: then the built-in ones are tokenized, and seeded tokens
            stand alone.

    Raises:
        ParityError: the engine's tokenizer differs from the training tokenizer on a text.
    """
    kind, task = engine.manifest.kind, reference.tasks[task_id]
    probes, agreed = [], 0
    if tokenizer is not None and engine.manifest.tokenizer is not None:
        shown = examples if examples is not None else builtin_examples(task)
        odd = odd_examples(task, engine.manifest.tokenizer.max_length)
        agreed = check_text(engine, tokenizer, task, [*shown, *odd])
        if examples is not None or task.kind != "generation":
            for name, batch in text_batches(shown):
                feeds = engine.tokenize(batch, truncate=True)
                check_layout(feeds, kind)
                probes.append(
                    Probe(
                        name,
                        feeds["input_ids"],
                        feeds["attention_mask"],
                        feeds.get("token_type_ids"),
                    )
                )
    config, limit = reference.hf.config, position_limit(reference)
    if engine.manifest.generation is not None and limit is not None:
        limit = max(1, limit - engine.manifest.generation.max_new_tokens)
    reads_types = any(
        spec.name == "token_type_ids"
        for graph in engine.manifest.graphs.values()
        for spec in graph.inputs
    )
    probes += synthetic(
        int(config.vocab_size),
        limit,
        token_types=int(config.type_vocab_size) if reads_types else 0,
        left=kind == "decoder-only",
        answers=_start(engine) if kind == "encoder-decoder" else None,
        # T5's prompts may change places where a batch has as many rows.
        rows=reference.prompts,
    )
    return probes, agreed


def _start(engine: Tokenizes) -> int:
    generation = engine.manifest.generation
    assert generation is not None
    assert generation.decoder_start_token_id is not None
    return generation.decoder_start_token_id


def prove(
    directory: Path,
    engine: Engine,
    reference: ReferenceModel,
    task_id: int,
    tokenizer: TrainingTokenizer | None,
    *,
    examples: Sequence[Example] | None = None,
    layers: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run the interface gate, the weight gate, the output gate and the decision gate.

    The first probe that fails is the last: a failure is fatal, and further ones say no more.

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
        ParityError: a weight, a tokenized text or what the manifest says of task, lengths and
            tokens is not the reference's, or the engine does not run.
    """
    check_manifest(engine.manifest, reference, task_id)
    progress("parity: weights")
    files = [graph.file for graph in engine.manifest.graphs.values()]
    weights = check_weights(directory, files, reference, task_id)
    report = ParityReport(
        (), bound_of(engine.manifest.precision), dict(layers or {}), weights, (), (), 0
    )
    return prove_outputs(
        engine, reference, task_id, tokenizer, report, examples=examples, progress=progress
    )


def prove_outputs(
    engine: Engine,
    reference: ReferenceModel,
    task_id: int,
    tokenizer: TrainingTokenizer | None,
    report: ParityReport,
    *,
    examples: Sequence[Example] | None,
    progress: Callable[[str], None],
) -> ParityReport:
    """Run the output gate and the decision gate; arguments as for `prove`.

    Args:
        engine: the engine of one task.
        reference: the unfolded model.
        task_id: position of the task in the reference's list.
        tokenizer: the tokenizer of training.
        report: what was found before.
        examples: texts to probe with.
        progress: called with what is being done.
    """
    probes, tokenized = make_probes(engine, reference, task_id, tokenizer, examples)
    report = dataclasses.replace(report, tokenized=tokenized)
    task = reference.tasks[task_id].name
    return run_probes(engine, reference, task, probes, report, progress)


def run_probes(
    engine: Engine,
    reference: ReferenceModel,
    task: str | Sequence[str],
    probes: Sequence[Probe],
    report: ParityReport,
    progress: Callable[[str], None],
) -> ParityReport:
    """Return a report with the outcomes of probes; the first that fails is the last.

    Args:
        engine: the engine.
        reference: the unfolded model.
        task: as for `check_outputs`.
        probes: the batches.
        report: what was found before.
        progress: called with what is being done.
    """
    bound = report.bound
    lossy_text = bound != FP32 and not all(probe.synthetic for probe in probes)
    for probe in probes:
        progress(f"parity: {probe.name}")
        allowed = bound.without_text if lossy_text and probe.synthetic else bound
        report = with_outcomes(report, probe, _outcomes(engine, reference, task, probe, allowed))
        if not report.agrees:
            break
    return report


def _outcomes(
    engine: Engine,
    reference: ReferenceModel,
    task: str | Sequence[str],
    probe: Probe,
    bound: Bound,
) -> list[Comparison | Decision]:
    """Return a probe's outcomes; an engine that cannot run it has failed it."""
    outcomes: list[Comparison | Decision] = []
    try:
        for outcome in check_outputs(engine, reference, task, probe, bound):
            outcomes.append(outcome)  # noqa: PERF402  # what came before an error counts
    except (InputError, InternalError) as error:
        outcomes.append(not_run(f"{probe.name}: the engine does not run: {error.found}"))
    return outcomes


def with_outcomes(
    report: ParityReport, probe: Probe, outcomes: Sequence[Comparison | Decision]
) -> ParityReport:
    """Return a report with a probe more, and what was found on it."""
    entry = {
        "name": probe.name,
        "shape": list(probe.shape),
        "synthetic": probe.synthetic,
        "rows_left_out": max(
            (o.left_out for o in outcomes if isinstance(o, Comparison)), default=0
        ),
    }
    report = dataclasses.replace(report, probes=(*report.probes, entry))
    return report.extended(outcomes)


def refuse(report: ParityReport, where: str) -> None:
    """Raise where a report has not passed.

    Args:
        report: the report.
        where: the step that is to blame, as far as it is known.

    Raises:
        ParityError: the first failure and the worst, and what would have passed; or that too
            little was compared.
    """
    if report.passed:
        return
    if report.agrees:
        raise ParityError(
            f"too little was compared: {report.unproven}, since the reference's own choices of "
            "experts there are within rounding of others",
            expected="at least half of the rows compared, and of text at least one",
            fix="give other texts with --probe; where routes are that close on every text, no "
            "other runtime is sure to choose the same experts",
        )
    bound, tensors = report.judged
    failed = [c for c in tensors if not c.passed]
    flipped = [d for d in report.decisions if d.flipped]
    if not failed and not flipped:
        raise ParityError("no output was compared with the reference's", fix=where)
    if not failed:
        first = flipped[0]
        raise ParityError(
            f"{len(flipped)} decisions differ from the reference, first on {first.probe}, row "
            f"{first.row}, step {first.step}: the reference is sure by {first.margin:.3g}, noise "
            f"is {first.noise:.3g}",
            fix=where,
        )
    worst = furthest(tensors)
    enough = bound.relative * worst.error / worst.bound if worst.bound else worst.error
    passing = f"; {enough:.2g} would have passed" if math.isfinite(enough) else ""
    raise ParityError(
        f"{len(failed)} of {len(tensors)} output tensors differ from the reference.\n"
        f"first: {failed[0].explain()}\nworst: {worst.explain()}",
        expected=f"at most {bound.relative:g} of the largest element ({bound.why})" + passing,
        fix=where,
    )
