"""The parity gate of an engine of several tasks: each by itself, and side by side in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from eptc.errors import InputError, ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.batches import seeded_probes
from eptc.parity_gate.compare import bound_of
from eptc.parity_gate.gate import prove_outputs, run_probes
from eptc.parity_gate.interface import check_manifest
from eptc.parity_gate.mixed import mixed_rows, mixed_seeds, mixed_text
from eptc.parity_gate.probes import Example, Probe, builtin_examples
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.task_weights import check_task_weights
from eptc.runtime import Engine
from eptc.runtime.spec import TASK_IDS
from eptc.text import TrainingTokenizer

__all__ = ["check_refused", "mixed_probes", "prove_tasks"]


def prove_tasks(
    directory: Path,
    engine: Engine,
    reference: ReferenceModel,
    task_ids: Sequence[int],
    tokenizer: TrainingTokenizer | None,
    *,
    examples: Mapping[str, Sequence[Example]] | None = None,
    layers: Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run the gates of `prove` for each task, then with rows of several tasks in one batch.

    The first task that fails is the last.

    Args:
        directory: the bundle's folder.
        engine: it, loaded in ONNX Runtime.
        reference: the unfolded PyTorch model.
        task_ids: positions of the engine's tasks in the reference's list, in the engine's order.
        tokenizer: the tokenizer of training.
        examples: texts to probe with, by the name of their task; the built-in ones for the
            others.
        layers: outcome of the layer gate by stage.
        progress: called with what is being done.

    Returns:
        The report, with one for each task and one for mixed batches in it.

    Raises:
        ParityError: as `prove`.
    """
    manifest, tasks = engine.manifest, [reference.tasks[task_id] for task_id in task_ids]
    if [task.name for task in manifest.tasks] != [task.name for task in tasks]:
        raise ParityError(
            f"the engine's tasks are {[task.name for task in manifest.tasks]}",
            expected=f"{[task.name for task in tasks]}, in this order",
            fix="this is a bug in eptc: report it",
        )
    views = [engine.for_task(place) for place in range(len(tasks))]
    for view, task_id in zip(views, task_ids, strict=True):
        check_manifest(view.manifest, reference, task_id)
    progress("parity: weights")
    files = [graph.file for graph in manifest.graphs.values()]
    weights = check_task_weights(directory, files, reference, task_ids)
    check_refused(engine)
    empty = ParityReport((), bound_of(manifest.precision), {}, 0.0, (), (), 0)
    parts: dict[str, ParityReport] = {}
    report = dataclasses.replace(empty, layers=dict(layers or {}), weights=max(weights))
    for view, task, task_id, weight in zip(views, tasks, task_ids, weights, strict=True):
        parts[task.name] = prove_outputs(
            view, reference, task_id, tokenizer, dataclasses.replace(empty, weights=weight),
            examples=(examples or {}).get(task.name),
            progress=_naming(task.name, progress),
        )  # fmt: skip
        if not parts[task.name].agrees:
            return report.of_tasks(parts, None)
    given = {
        task.name: (examples or {}).get(task.name) or builtin_examples(task) for task in tasks
    }
    probes = mixed_probes(engine, reference, tokenizer, given)
    names = [task.name for task in tasks]
    mixed = run_probes(engine, reference, names, probes, empty, progress)
    return report.of_tasks(parts, mixed)


def mixed_probes(
    engine: Engine,
    reference: ReferenceModel,
    tokenizer: TrainingTokenizer | None,
    examples: Mapping[str, Sequence[Example]],
) -> list[Probe]:
    """Return batches whose rows are of several tasks.

    Args:
        engine: an engine of several tasks.
        reference: the unfolded model.
        tokenizer: the tokenizer of training; without it there is no text among them.
        examples: texts of each task, by its name.
    """
    probes: list[Probe] = []
    if tokenizer is not None and engine.manifest.tokenizer is not None:
        probes += [mixed_text(engine, name, rows) for name, rows in mixed_rows(examples).items()]
    seeded = seeded_probes(engine.for_task(0).manifest, reference)
    return probes + list(mixed_seeds(seeded, len(engine.tasks)))


def check_refused(engine: Engine) -> None:
    """Check that graphs fail where a row names no task, for callers that do not look.

    Raises:
        ParityError: one answers.
    """
    for name in engine.manifest.graphs:
        for place in (-1, len(engine.tasks)):
            _check_refused(engine, name, place)


def _check_refused(engine: Engine, name: str, place: int) -> None:
    sizes = {"past_sequence": 0}
    feeds = {
        spec.name: np.zeros(
            [size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape],
            spec.dtype,
        )
        + ("mask" in spec.name)
        for spec in engine.manifest.graphs[name].inputs
    }
    try:
        engine._graph(name).run({**feeds, TASK_IDS: np.array([place])})
    except InputError:
        return
    raise ParityError(
        f"the graph {name!r} answers a row of task {place}, which there is not",
        expected="an error",
        fix="this is a bug in the lowering: report it",
    )


def _naming(task: str, progress: Callable[[str], None]) -> Callable[[str], None]:
    return lambda said: progress(f"{said}, task {task}")
