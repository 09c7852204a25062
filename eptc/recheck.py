"""The parity gate again, later: a bundle against the checkpoint it was made from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import checkpoint
from eptc.calibration import twin
from eptc.errors import BundleError, OptionError, OutputError, ParityError
from eptc.examples_file import Example, read_examples, read_task_examples
from eptc.lossy import budget_of
from eptc.machine import available_memory
from eptc.options import Options
from eptc.packs.export import pack_gate
from eptc.parity_gate.answers import Budget, answers, compare_answers, right_answers
from eptc.parity_gate.compare import FP32, bound_of
from eptc.parity_gate.gate import refuse
from eptc.parity_gate.memory import verified_by_block, whole_model_bytes
from eptc.parity_gate.packs import PackGate
from eptc.parity_gate.reference_answers import reference_answers
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.verifier import LocalVerifier, Subject
from eptc.precision import SCHEMES
from eptc.runtime import Engine, Manifest, load_manifest
from eptc.runtime.pack import Pack, only_task, open_engine
from eptc.runtime.spec import PACK
from eptc.stacking import refused_blocks
from eptc.tasks import Task

__all__ = ["parity"]

_CALIBRATED, _SIMULATED = (
    {str(name) for name, scheme in SCHEMES.items() if getattr(scheme, what)}
    for what in ("calibrated", "simulated")
)


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
        progress: called with what is being done.

    Returns:
        The report; it has passed.

    Raises:
        InputError: the bundle, the checkpoint or the data cannot be used, or the bundle was made
            from another checkpoint or base.
        OutputError: temporary files cannot be written.
        ParityError: the engine does not give the reference's answers.
    """
    folder = Path(bundle)
    pack = _pack(folder, task)
    packed = "" if pack is None else only_task(pack.manifest, task, folder)
    manifest = load_manifest(folder) if pack is None else pack.manifest.engine(packed)
    tasks_of = manifest.tasks or (() if manifest.task is None else (manifest.task,))
    if not tasks_of:
        raise BundleError(f"{folder} was built for no task", expected="a task's bundle")
    recorded = manifest.checkpoint
    kind = _format(folder, recorded) if format is None else checkpoint.find_format(format)
    specs = None
    if not kind.describes_tasks:
        specs = {t["name"]: Task.from_json(t) for t in recorded["tasks"]}
        tasks = tasks or list(specs)
        top_k = top_k if top_k is not None else recorded["top_k"]
    source = checkpoint.read(
        Path(reference),
        Path(base) if base is not None else None,
        top_k=top_k,
        tasks=tasks,
        task_spec=Path(task_spec) if task_spec is not None else None,
        specs=specs,
        allow_pickle=allow_pickle,
        format=kind.name,
        routing=_routing(manifest),
    )
    _check_origin(folder, manifest, source)
    names = [t.name for t in source.contents.tasks]
    if lost := [task.name for task in tasks_of if task.name not in names]:
        raise BundleError(
            f"{folder} was built for task {lost[0]!r}, which the checkpoint does not have",
            expected=", ".join(names),
        )
    examples = None if data is None else _labelled(Path(data), manifest)
    for name in examples or {}:
        if next(task for task in tasks_of if task.name == name).kind == "generation":
            raise OptionError(f"task {name!r} has no labels to score", fix="leave --data out")
    by_block = pack is None and _by_block(folder, manifest.precision, source)
    subject = Subject(source, tasks_of[0].name, None, by_block)
    if not manifest.tasks:
        if examples is not None:
            subject = dataclasses.replace(subject, examples=examples[tasks_of[0].name])
    elif by_block:
        raise refused_blocks(source, manifest.precision)
    else:
        chosen = [task.name for task in tasks_of]
        subject = dataclasses.replace(subject, task=chosen, examples=examples)
    with contextlib.ExitStack() as stack:
        verifier: LocalVerifier | PackGate
        if pack is not None:
            verifier = pack_gate(source, None)
            rows = None if examples is None else examples[tasks_of[0].name]
            report, _ = verifier.prove(pack, packed, examples=rows, progress=progress)
        else:
            verifier = stack.enter_context(contextlib.closing(LocalVerifier(subject)))
            if manifest.precision in _SIMULATED:
                folder = _simulated(folder, manifest, stack)
            report = verifier.prove(folder, {}, progress)
            refuse(report, "build the bundle again; if it fails again, report it")
        if examples is None or verifier.tokenizer is None:
            return report
        progress("score")
        with open_engine(folder, task=packed or None, providers=["cpu"]) as engine:
            scores = {
                name: _scores(engine.for_task(name), verifier, rows)
                for name, rows in examples.items()
            }
    return dataclasses.replace(
        report, scores=scores if manifest.tasks else scores[tasks_of[0].name]
    )


def _pack(folder: Path, task: str | None) -> Pack | None:
    """Return the pack in a folder; None where it is a bundle, of which every task is compared."""
    if (folder / PACK).exists():
        return Pack.load(folder, providers=["cpu"])
    if task is not None:
        raise OptionError(
            f"--task {task} was given for {folder}, which is no pack",
            fix="leave it out: every task of a bundle is compared",
        )
    return None


def _labelled(path: Path, manifest: Manifest) -> dict[str, list[Example]]:
    """Return the labelled rows of a file by the name of their task."""
    if manifest.tasks:
        return read_task_examples(path, manifest.tasks, labelled=True)
    assert manifest.task is not None
    return {manifest.task.name: read_examples(path, manifest.task, labelled=True)}


def _scores(
    engine: Engine, verifier: LocalVerifier | PackGate, examples: Sequence[Example]
) -> dict[str, Any]:
    """Return how an engine of one task and the reference score on labelled rows.

    Raises:
        ParityError: the engine loses more than it may.
    """
    manifest, task = engine.manifest, engine.task
    assert task is not None
    assert verifier.tokenizer is not None
    got = answers(engine, examples)
    want = reference_answers(manifest, verifier.reference, task, verifier.tokenizer, examples)
    scores = compare_answers(
        task, want, got, right_answers(task, examples), precision=manifest.precision
    )
    fixes = _what_loses(manifest)
    budget = _allowed(manifest, task) if fixes else Budget(max_flips=0.0)
    if reason := budget.exceeded(scores):
        raise ParityError(reason, fix=", ".join(fixes) or "build the bundle again")
    return scores


def _what_loses(manifest: Manifest) -> list[str]:
    """Return what to do about what an engine loses by design; nothing of an exact one."""
    fixes = []
    if manifest.routing.mode == "frozen":
        fixes.append("build with --routing exact, which keeps the routes")
    if bound_of(manifest.precision) != FP32:
        fixes.append("build with a precision that loses less")
    return [*fixes, "or with a larger budget (--max-drop, --max-flips)"] if fixes else []


def _allowed(manifest: Manifest, task: Task) -> Budget:
    """Return what a lossy engine may cost: what its build was allowed, or what is usual."""
    recorded = (manifest.parity.get("scores") or {}).get("budget")
    if recorded is None:
        return budget_of(Options(task.name), task)
    return Budget(recorded["max_drop"], recorded["max_flips"])


def _simulated(folder: Path, manifest: Manifest, stack: contextlib.ExitStack) -> Path:
    """Return the twin of a 16-bit engine, a copy that the stack removes.

    Raises:
        OutputError: there is no room for it where temporary files are kept.
    """
    try:
        return stack.enter_context(twin(folder))
    except OSError as error:
        size = sum(record.size for record in manifest.files.values())
        raise OutputError(
            f"{folder} is an engine in {manifest.precision}, compared by a simulation of it, and "
            f"that cannot be written: {error.strerror or error}"
            + (f": {error.filename}" if error.filename else ""),
            expected=f"{size / 1e6:.0f} MB free where temporary files are kept",
            fix="free some space, or name another folder with the environment variable TMPDIR",
        ) from error


def _format(folder: Path, recorded: Mapping[str, Any]) -> checkpoint.Format:
    """Return the format of the checkpoint that a bundle was made from.

    Raises:
        BundleError: a package reads it that is not installed.
    """
    try:
        return checkpoint.find_format(recorded["format"])
    except OptionError as error:
        if (origin := recorded.get("origin")) is None:
            raise
        package, _, version = origin.rpartition(" ")
        raise BundleError(
            f"{folder} was made from a checkpoint of the format {recorded['format']!r}, which the "
            f"package {package} reads, and it is not installed",
            fix=f"install {package} ({version} made the bundle)",
        ) from error


def _routing(manifest: Manifest) -> checkpoint.Routing:
    """Return what a build was asked to do with routes that depend on the input."""
    mode = manifest.routing.mode
    return mode if mode in ("batch", "per-sample") else "exact"


def _by_block(folder: Path, precision: str, source: checkpoint.Checkpoint) -> bool:
    """Return whether a bundle is verified block by block.

    Raises:
        OptionError: it has to be for want of memory, and cannot be.
    """
    available = available_memory()
    found = verified_by_block(source, precision, available)
    if found and precision in _CALIBRATED:
        assert available is not None
        raise OptionError(
            f"{folder} is an engine in {precision}, whose ranges hold for the model as a whole: "
            f"comparing it takes {whole_model_bytes(source) / 1e9:.1f} GB, {available / 1e9:.1f} "
            "GB are available",
            fix="compare it where there is more memory",
        )
    return found


def _check_origin(folder: Path, manifest: Manifest, source: checkpoint.Checkpoint) -> None:
    for what, recorded, found in (
        ("checkpoint", manifest.checkpoint["sha256"], source.sha256),
        ("base model", manifest.base["sha256"], source.base.sha256),
    ):
        if recorded != found:
            raise BundleError(
                f"{folder} was made from another {what}: SHA-256 {recorded[:16]}..., "
                f"the one given has {found[:16]}...",
                fix=f"give the {what} it was made from, or build it again",
            )
    # The hash covers the tensors; this is said beside them.
    given: dict[str, object] = {
        "variant": source.contents.variant,
        "top_k": source.contents.top_k,
        "kernel_sizes": list(source.contents.kernel_sizes),
    }
    for key, value in given.items():
        if manifest.checkpoint.get(key) != value:
            raise BundleError(
                f"{folder} was made with {key} {manifest.checkpoint.get(key)}, the checkpoint "
                f"given has {value}",
                fix="give the checkpoint it was made from, or build it again",
            )
