"""From a checkpoint to a published bundle: the whole road, in order."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import onnx_ir

from eptc import bundle, checkpoint, lower, text
from eptc.describe import OPSET, describe, write_texts
from eptc.errors import OptionError
from eptc.fitting import check_fit, task_config
from eptc.ir import AdaptedModel
from eptc.passes.narrow_weights import NarrowWeights
from eptc.pipeline import (
    OptimizeFor,
    PassRecord,
    Precision,
    adapter_passes,
    graph_passes,
    run_adapter_passes,
    run_graph_passes,
)
from eptc.planning import WRITERS, Plan, make_plan
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest
from eptc.skeletons import skeleton
from eptc.tasks import Task, resolve

if TYPE_CHECKING:
    from eptc.parity_gate import ParityReport, Verifier

__all__ = ["TARGETS", "Bundle", "Event", "Options", "Written", "export", "plan", "precise_routes"]

TARGETS = ("onnx",)
# A log-probability gap below this can flip under other float32 arithmetic.
SMALL_MARGIN = 1e-4


@dataclasses.dataclass(frozen=True)
class Written:
    """How far the weights are written.

    Args:
        done: bytes written so far.
        total: bytes in all.
    """

    done: int
    total: int


Event = str | PassRecord | Written
Progress = Callable[[Event], None]


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


@dataclasses.dataclass(frozen=True)
class Options:
    """What a build is asked for; `export` describes each."""

    task: str | int
    base: str | Path | None = None
    target: str = "onnx"
    tasks: Sequence[str] | None = None
    top_k: int | None = None
    task_spec: str | Path | None = None
    probe: str | Path | None = None
    precision: Precision = "fp32"
    optimize_for: OptimizeFor = "cpu"
    max_memory: int | None = None
    verify: bool = True
    allow_pickle: bool = False

    def check(self) -> None:
        """Raise OptionError for a value that no build can have."""
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("precision", self.precision, get_args(Precision)),
            ("provider to optimize for", self.optimize_for, get_args(OptimizeFor)),
        ):
            if value not in known:
                raise OptionError(f"the {name} is {value!r}", expected=" or ".join(known))
        if self.probe is not None and not self.verify:
            raise OptionError("--probe was given together with --no-verify", fix="leave one out")


@dataclasses.dataclass(frozen=True)
class _Job:
    """A build whose inputs were read and go together; no weight was."""

    options: Options
    source: checkpoint.Checkpoint
    task_id: int
    config: Any
    plan: Plan

    @classmethod
    def read(cls, ckpt: str | Path, options: Options) -> _Job:
        options.check()
        source = checkpoint.read(
            Path(ckpt),
            Path(options.base) if options.base is not None else None,
            top_k=options.top_k,
            tasks=options.tasks,
            task_spec=Path(options.task_spec) if options.task_spec is not None else None,
            allow_pickle=options.allow_pickle,
        )
        task_id = resolve(options.task, source.contents.tasks)
        config = task_config(source, task_id)
        check_fit(source, task_id, config)
        plan = make_plan(
            source, config, precision=options.precision, verify=options.verify,
            max_memory=options.max_memory,
        )  # fmt: skip
        return cls(options, source, task_id, config, plan)

    @property
    def dtype(self) -> str | None:
        """Type that folded weights are rounded to; None for each base weight's own."""
        return None if self.options.precision == "keep" else "float32"

    def bound(self, model: AdaptedModel) -> dict[str, onnx_ir.Model]:
        """Return the graphs with a model's weights, none of them read."""
        found = skeleton(self.config, opset=OPSET, tied_head=self.source.base.tied_head)
        graphs = found.copy_graphs()
        lower.bind(graphs, model.weights)
        return graphs

    def graph_passes(self) -> list[Any]:
        """Return the passes over the graphs."""
        return graph_passes(self.options.optimize_for, self.options.precision)


class _Clock:
    """Wall time by stage; reports each stage as it starts."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def export(
    ckpt: str | Path,
    *,
    task: str | int,
    out: str | Path,
    base: str | Path | None = None,
    target: str = "onnx",
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    probe: str | Path | None = None,
    precision: Precision = "fp32",
    optimize_for: OptimizeFor = "cpu",
    max_memory: int | None = None,
    verify: bool = True,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Compile one task of a checkpoint into a verified engine.

    Args:
        ckpt: folder of a native checkpoint or of the released EPT code.
        task: the task's name, an alias of it, or its id.
        out: folder of the bundle: new, empty, or replaced with `force`.
        base: folder of the base model.
        target: what to write; `onnx`.
        tasks: task names in id order, where the checkpoint does not store them.
        top_k: experts a task uses, where the checkpoint does not store it.
        task_spec: JSON file with prompts and labels of tasks that are not the published ones.
        probe: JSON lines file with examples to verify on; None for built-in text.
        precision: `fp32`, or `keep`: matrices are stored in the base's own 16-bit type, folded
            ones rounded to it once; the engine computes in float32.
        optimize_for: the execution provider whose kernels the graphs are fused for, `cpu` or
            `cuda`; `any`: standard operators only.
        max_memory: bytes that each process of the build may have resident; None: what is
            available now. Where the whole model does not fit it is verified block by block.
        verify: False publishes an engine nobody compared with anything; the manifest says so.
        allow_pickle: read `adapter_model.bin` (weights only).
        force: replace what lies at `out`.
        progress: called with each stage (a string), each finished pass and, while weights are
            written, how many are.

    Returns:
        The published bundle.

    Raises:
        InputError: something about the input; nothing was written.
        ParityError: the engine does not give the reference's answers; nothing was published.
    """
    out = Path(out)
    bundle.check_place(
        out,
        force=force,
        inputs={
            "the checkpoint": ckpt, "the base model": base, "the probes": probe,
            "the task description": task_spec,
        },
    )  # fmt: skip
    options = Options(
        task, base, target, tasks, top_k, task_spec, probe, precision, optimize_for, max_memory,
        verify, allow_pickle,
    )  # fmt: skip
    clock = _Clock(progress)
    with contextlib.ExitStack() as stack:
        with clock.stage("read the checkpoint"):
            job = _Job.read(ckpt, options)
            source = job.source
            examples = _examples(probe, source.contents.tasks[job.task_id])
            tokenizer = text.find_tokenizer(source.path, source.base.path)
            generation = text.generation_config(source.base.path)
        verifier = stack.enter_context(_verifier(job, examples)) if verify else None
        # Hashing takes one processor, tracing another.
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        checked = pool.submit(source.check_base)
        with clock.stage("trace"):
            skeleton(job.config, opset=OPSET, tied_head=source.base.tied_head)
        with clock.stage("hash and check the base model"):
            checked.result()
        layers: dict[str, float] = {}
        with clock.stage("specialise and fold"):
            model, records = _rewrite(job, verifier, layers, progress)
        with clock.stage("graph passes"):
            graphs = job.bound(model)
            graph_records = run_graph_passes(graphs, job.graph_passes())
            for record in graph_records:
                progress(record)
        records += graph_records

        draft = stack.enter_context(bundle.draft(out, force=force))
        with clock.stage("write"):
            digests = lower.write(
                graphs, draft.path, threads=WRITERS, in_flight=job.plan.in_flight,
                progress=lambda done, total: progress(Written(done, total)),
            )  # fmt: skip
            # Settings that config.json leaves out have the values transformers gives them.
            settings = {**job.config.to_dict(), **model.config}
            manifest = describe(
                source, job.task_id, settings, generation, graphs, tokenizer, records,
                precision=job.plan.stored, optimize_for=optimize_for,
            )  # fmt: skip
            write_texts(draft.path, source, model, generation, tokenizer)
            manifest = bundle.write_manifest(draft.path, manifest, digests)
        if verifier is not None:
            with clock.stage("parity"):
                report = verifier.prove(draft.path, layers, progress)
                if not report.passed:
                    _refuse(report, job, model, manifest, draft.path, verifier, layers)
                bundle.write_json(draft.path / "parity.json", report.to_json())
                manifest = dataclasses.replace(manifest, parity=report.summary())
                manifest = bundle.write_manifest(draft.path, manifest)
        draft.publish()
    notes = precise_routes(source, job.task_id)
    return Bundle(draft.out, manifest, tuple(records), notes, clock.seconds)


def plan(ckpt: str | Path, **options: Any) -> Plan:
    """Predict what a build takes, before any weight is read.

    Args:
        ckpt: folder of the checkpoint.
        options: as for `export`, without `out`, `force` and `progress`.

    Raises:
        InputError: something about the input.
    """
    return _Job.read(ckpt, Options(**options)).plan


def precise_routes(source: checkpoint.Checkpoint, task_id: int) -> tuple[str, ...]:
    """Return a warning for each linear whose choice of experts is within rounding of another."""
    notes = []
    for path, adapter in source.contents.adapters.items():
        router = adapter.router
        if router is None:
            continue
        margin = router.route(task_id).margin
        if margin < SMALL_MARGIN:
            notes.append(
                f"{path}: the last expert chosen leads by only {margin:.1e} in log probability; "
                "arithmetic in bfloat16 may choose another"
            )
    return tuple(notes)


def _examples(probe: str | Path | None, task: Task) -> list[Mapping[str, Any]] | None:
    if probe is None:
        return None
    from eptc.parity_gate import read_examples

    return read_examples(Path(probe), task)


@contextlib.contextmanager
def _verifier(job: _Job, examples: Sequence[Mapping[str, Any]] | None) -> Iterator[Verifier]:
    """Give the reference side, in a process of its own where the plan says so."""
    from eptc.parity_gate import LocalVerifier, RemoteVerifier, Subject

    options = job.options
    subject = Subject(
        job.source, options.task, options.top_k, options.tasks, options.allow_pickle, examples,
        job.plan.verification == "block by block",
    )  # fmt: skip
    found = RemoteVerifier(subject) if job.plan.own_process else LocalVerifier(subject)
    with contextlib.closing(found):
        yield found


def _rewrite(
    job: _Job, verifier: Verifier | None, layers: dict[str, float], progress: Progress
) -> tuple[AdaptedModel, list[PassRecord]]:
    """Run the adapter passes; with a reference, each is followed by the layer gate."""
    passes, task_id, model = adapter_passes(job.task_id, job.dtype), job.task_id, job.source.model
    if verifier is None:
        return run_adapter_passes(
            model, passes, task_id=task_id, probe=None, after=lambda record, _: progress(record)
        )
    from eptc.parity_gate import LayerGate

    stage = f"the {job.source.contents.format} reader"
    gate = LayerGate(verifier.layers())
    layers[stage] = gate.check(model, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        stage = f"the pass {record.name}"
        layers[stage] = gate.check(model, stage)
        progress(record)

    return run_adapter_passes(model, passes, task_id=task_id, probe=gate.probe, after=after)


def _refuse(
    report: ParityReport,
    job: _Job,
    model: AdaptedModel,
    manifest: Manifest,
    directory: Path,
    verifier: Verifier,
    layers: Mapping[str, float],
) -> None:
    """Raise ParityError and name the first step after which the engine is off.

    Every linear and every weight agreed with the reference, so the graph is wrong: it is built
    again with one graph pass more each time.
    """
    from eptc.parity_gate import refuse

    steps = job.graph_passes()
    guilty = f"the pass {steps[-1].name}"
    written = {lower.WEIGHTS, *(graph.file for graph in manifest.graphs.values())}
    for count in range(len(steps)):
        graphs = job.bound(model)
        # How weights are stored is part of what the reference is compared with.
        storing = [step for step in steps[count:] if isinstance(step, NarrowWeights)]
        run_graph_passes(graphs, [*steps[:count], *storing])
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            trial = Path(folder)
            for name in manifest.files:
                if name not in written:
                    shutil.copy(directory / name, trial / name)
            lower.write(graphs, trial, in_flight=job.plan.in_flight)
            bundle.write_manifest(trial, dataclasses.replace(manifest, files={}))
            if not verifier.prove(trial, layers, lambda _: None).passed:
                guilty = f"the pass {steps[count - 1].name}" if count else "the lowering"
                break
    refuse(report, f"{guilty} is the first step after which the engine is off: report this bug")
