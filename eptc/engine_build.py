"""From a checkpoint to a published bundle: the whole road, in order."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eptc import bundle
from eptc.close_routes import close_routes
from eptc.compiled import Compiler
from eptc.errors import ParityError
from eptc.examples_file import Example
from eptc.freezing import freeze, routes_on_input
from eptc.given_texts import GivenTexts
from eptc.interop.optimum import check_layout, lay_out
from eptc.job import Clock, Job, Progress
from eptc.options import Options
from eptc.parity_lines import beside_routes
from eptc.run_passes import PassRecord
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import MANIFEST

if TYPE_CHECKING:
    from eptc.parity_gate import Subject, Verifier

__all__ = ["Bundle", "build_engine"]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A published bundle.

    Args:
        path: its folder.
        manifest: its manifest.
        passes: what each pass did, with times.
        warnings: what a user should know although nothing failed.
        seconds: wall time by stage.
    """

    path: Path
    manifest: Manifest
    passes: tuple[PassRecord, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]

    def load(self, **options: Any) -> Engine:
        """Load the bundle's engine; `options` as for `Engine.load`."""
        return Engine.load(self.path, **options)


def build_engine(
    ckpt: str | Path,
    options: Options,
    *,
    out: Path,
    force: bool,
    progress: Progress,
    rejected: Callable[[Path], object] | None,
) -> Bundle:
    """Build a verified engine and publish its bundle; arguments and errors as for `eptc.export`.

    Args:
        ckpt: folder of the checkpoint.
        options: what is asked for.
        out: folder of the bundle.
        force: replace what lies there.
        progress: called with what is being done.
        rejected: called with the folder of an engine that does not pass.
    """
    bundle.check_place(out, force=force, inputs=options.inputs(ckpt))
    clock = Clock(progress)
    with contextlib.ExitStack() as stack:
        with clock.stage("read the checkpoint"):
            job = Job.read(ckpt, options)
            source = job.source
            if options.build:
                from eptc.tensorrt.build import build_engines, check_plan

                check_plan(job.plan)
            if options.layout == "optimum":
                check_layout(job)
            texts = GivenTexts.read(options, job)
        verifier = None
        if options.verify:
            verifier = stack.enter_context(_verifier(job, texts.probe))
        # Hashing takes one processor, tracing another.
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        checked = pool.submit(source.check_base)
        with clock.stage("trace"):
            job.skeleton()
        with clock.stage("hash and check the base model"):
            checked.result()
        compiler = Compiler(job, verifier, clock, progress)
        with clock.stage("specialise and fold"):
            model, records = compiler.rewrite()
        engine = compiler.compile(model, records)

        draft = stack.enter_context(bundle.draft(out, force=force))
        if rejected is not None:
            stack.enter_context(_shown(draft.path, rejected))
        routed, frozen_notes = None, tuple[str, ...]()
        if options.routing == "frozen" and routes_on_input(model):
            routed = engine.proven(draft.path / "routed")
            with clock.stage("freeze the routers"):
                frozen = freeze(
                    model, engine.graphs, routed, texts.texts, dtype=job.dtype, progress=progress
                )
            frozen_notes = frozen.notes
            engine = compiler.compile(frozen.model, [*records, *frozen.records])
        exact = engine.proven(draft.path / "exact") if job.needs_exact else None
        lowered_notes = tuple[str, ...]()
        if job.scheme.lossy:
            lowered_notes = engine.lower_precision(draft.path, exact, texts)
        manifest = engine.write(draft.path, job.plan.stored)
        if (judge := engine.judge) is not None:
            if job.scheme.lossy:
                judge.prove_lossy(draft.path, routed or exact, texts.data)
            else:
                judge.prove_exact(draft.path, manifest)
                if routed is not None and texts.data is not None:
                    judge.score(
                        draft.path, routed, texts.data, "frozen routes",
                        "keep the routes with --routing exact, or give a larger budget "
                        "(--max-drop, --max-flips)",
                    )  # fmt: skip
            if routed is not None:
                changed = judge.compare_routed(draft.path, routed, texts.texts, texts.called)
                frozen_notes += texts.cautions(beside_routes(changed))
            manifest = judge.signed(draft.path, manifest)
        for folder in (exact, routed):
            if folder is not None:
                shutil.rmtree(folder)
        if options.layout == "optimum":
            with clock.stage("layout optimum"):
                manifest = lay_out(draft.path, manifest, verify=options.verify)
        if options.target != "onnx":
            with clock.stage(f"target {options.target}"):
                manifest = options.aim.add(draft.path, manifest)
        if options.build:
            with clock.stage("build and prove the engines"):
                subject = _subject(job, texts.probe)
                manifest = build_engines(draft.path, manifest, subject, progress)
        draft.publish()
    notes = (
        *source.contents.notes, *close_routes(source, *job.task_ids), *texts.notes,
        *frozen_notes, *lowered_notes, *options.aim.target.notes(manifest),
    )  # fmt: skip
    return Bundle(draft.out, manifest, tuple(engine.records), notes, clock.seconds)


@contextlib.contextmanager
def _shown(folder: Path, rejected: Callable[[Path], object]) -> Iterator[None]:
    """Show the engine in a draft that does not pass; the last that was written as a whole."""
    try:
        yield
    except ParityError:
        for written in (folder, folder / "exact", folder / "routed"):
            if (written / MANIFEST).exists():
                rejected(written)
                break
        raise


@contextlib.contextmanager
def _verifier(
    job: Job, examples: Sequence[Example] | Mapping[str, Sequence[Example]] | None
) -> Iterator[Verifier]:
    """Give the reference side, in a process of its own where the plan says so."""
    from eptc.parity_gate import LocalVerifier, RemoteVerifier

    subject = _subject(job, examples)
    found = RemoteVerifier(subject) if job.plan.own_process else LocalVerifier(subject)
    with contextlib.closing(found):
        yield found


def _subject(
    job: Job, examples: Sequence[Example] | Mapping[str, Sequence[Example]] | None
) -> Subject:
    from eptc.parity_gate import Subject

    # The task, or tasks, as the caller named them.
    asked = 0 if job.options.task is None else job.options.task
    by_block = job.plan.verification == "block by block"
    return Subject(job.source, asked, examples, by_block)
