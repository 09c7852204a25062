"""The parity gate again, later: a bundle against the checkpoint it was made from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eptc.errors import ParityError
from eptc.interop.optimum import added_graphs, compare_first_step
from eptc.packs.export import pack_gate
from eptc.pair import Pair
from eptc.parity_gate.gate import refuse
from eptc.parity_gate.packs import PackGate
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.verifier import LocalVerifier
from eptc.runtime import Provider

__all__ = ["parity"]


def parity(
    bundle: str | Path,
    *,
    reference: str | Path,
    task: str | None = None,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    data: str | Path | None = None,
    allow_pickle: bool = False,
    format: str | None = None,
    providers: Sequence[Provider] | None = None,
    allow_fallback: bool = False,
    progress: Callable[[Any], None] = lambda _: None,
) -> ParityReport:
    """Compare a bundle with the unfolded PyTorch model.

    Engines in 16 bits are judged by their twin (`eptc.calibration.simulated`): a CPU rounds
    elsewhere. Below float32 labels may change where the reference is sure, and the metric drop, by
    what the build was allowed on data, or else by what a build is allowed that is given no budget;
    in other engines no label may.

    Args:
        bundle: the bundle's folder, or a pack's.
        reference: the checkpoint it was made from.
        task: of a pack, the task; None where there is one. Both its engines are compared.
        base: the base model's folder.
        tasks: task names in id order; None: the manifest's.
        top_k: experts a task uses; None: the manifest's.
        task_spec: JSON file with prompts and labels; None: the manifest's.
        data: JSON lines file with labelled examples; both sides are scored on it. Where the
            engine serves several tasks each row names its own in `task`.
        allow_pickle: read `.bin` files (weights only).
        format: of the checkpoint; None: the manifest's.
        providers: where the engine runs, as for `Engine.load`; None: on the CPU, for which all
            bounds were measured.
        allow_fallback: as for `Engine.load`.
        progress: called with what is being done.

    Returns:
        The report; it has passed.

    Raises:
        InputError: the bundle, the checkpoint or the data cannot be used, or the bundle was made
            from another checkpoint or base.
        OutputError: temporary files cannot be written.
        ParityError: the engine does not give the reference's answers.
    """
    pair = Pair.open(
        bundle, reference=reference, task=task, base=base, tasks=tasks, top_k=top_k,
        task_spec=task_spec, data=data, allow_pickle=allow_pickle, format=format,
        providers=providers, allow_fallback=allow_fallback,
    )  # fmt: skip
    with pair.comparable() as folder, contextlib.ExitStack() as stack:
        verifier: LocalVerifier | PackGate
        if pair.pack is not None:
            verifier = pack_gate(pair.source, None)
            report, _ = verifier.prove(
                pair.pack, pair.packed, examples=pair.examples, progress=progress
            )
        else:
            verifier = stack.enter_context(
                contextlib.closing(LocalVerifier(pair.subject, pair.engine_options))
            )
            report = verifier.prove(folder, {}, progress)
            refuse(report, "build the bundle again; if it fails again, report it")
            if added_graphs(pair.manifest):
                progress("parity: the first step")
                compare_first_step(pair.folder, pair.manifest)
        if data is not None:
            progress("score")
        scores = pair.scores(folder, verifier)
    if scores is None:
        return report
    for name, found in scores.items():
        if reason := pair.budget(name).exceeded(found):
            raise ParityError(reason, fix=", ".join(pair.fixes) or "build the bundle again")
    several = bool(pair.manifest.tasks)
    return dataclasses.replace(report, scores=scores if several else scores[pair.task.name])
