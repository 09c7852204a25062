"""From a checkpoint to a published bundle: the whole road, in order."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import onnx_ir

from eptc import bundle, checkpoint, lower, text
from eptc.checkpoint import Routing
from eptc.describe import describe, write_texts
from eptc.errors import InputError, ParityError
from eptc.examples_file import Example, read_task_examples
from eptc.freezing import freeze, routes_on_input
from eptc.interop.base import Folder
from eptc.interop.optimum import check_layout, lay_out
from eptc.interop.targets import export_folder, folder_target
from eptc.interop.triton import REPOSITORIES, export_repository
from eptc.ir import AdaptedModel
from eptc.job import Clock, Event, Job, Progress, Written
from eptc.lower.blocks import Method
from eptc.options import CalibrationMethod, Layout, Options
from eptc.parity_lines import beside_routes
from eptc.pass_base import AdapterPass, GraphPass
from eptc.pipeline import PassRecord, run_adapter_passes, run_graph_passes
from eptc.planning import WRITERS, Plan
from eptc.precision import OptimizeFor, Precision
from eptc.precision_plan import FILE as PLAN
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import MANIFEST
from eptc.tasks import TaskChoice

if TYPE_CHECKING:
    from eptc.judge import Judge
    from eptc.parity_gate import Subject, Verifier

__all__ = ["Bundle", "Event", "Folder", "Options", "Written", "export", "plan", "precise_routes"]

# A log-probability gap below this can flip under other float32 arithmetic.
SMALL_MARGIN = 1e-4


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


class _Choices(TypedDict, total=False):
    """What `export` takes whatever it writes."""

    task: TaskChoice
    base: str | Path | None
    tasks: Sequence[str] | None
    top_k: int | None
    task_spec: str | Path | None
    probe: str | Path | None
    precision: Precision
    precision_plan: str | Path | None
    calibration: str | Path | None
    calibration_method: CalibrationMethod
    block_method: Method
    data: str | Path | None
    max_drop: float | None
    max_flips: float | None
    search_evaluations: int | None
    search_minutes: float | None
    optimize_for: OptimizeFor | None
    max_memory: int | None
    verify: bool
    allow_pickle: bool
    format: str | None
    routing: Routing
    passes: Sequence[str | AdapterPass | GraphPass]
    max_rank: int | None
    genai_python: str | Path | None
    profile: Sequence[str]
    tensorrt_version: str | None
    build: bool
    force: bool
    progress: Progress
    rejected: Callable[[Path], object] | None


@overload
def export(  # type: ignore[overload-overlap]  # `str` has the names of targets yet to be installed
    ckpt: str | Path,
    *,
    out: str | Path,
    target: Literal["lora", "hf", "genai", "triton"],
    **choices: Unpack[_Choices],
) -> Folder: ...


@overload
def export(
    ckpt: str | Path,
    *,
    out: str | Path,
    layout: Literal["pack"],
    target: Literal["onnx"] = ...,
    **choices: Unpack[_Choices],
) -> Folder: ...


@overload
def export(
    ckpt: str | Path,
    *,
    out: str | Path,
    target: str = ...,
    layout: Literal["flat", "optimum"] = ...,
    **choices: Unpack[_Choices],
) -> Bundle: ...


def export(
    ckpt: str | Path,
    *,
    task: TaskChoice = None,
    out: str | Path,
    base: str | Path | None = None,
    target: str = "onnx",
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    probe: str | Path | None = None,
    precision: Precision = "fp32",
    precision_plan: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_method: CalibrationMethod = "minmax",
    block_method: Method = "rtn",
    data: str | Path | None = None,
    max_drop: float | None = None,
    max_flips: float | None = None,
    search_evaluations: int | None = None,
    search_minutes: float | None = None,
    optimize_for: OptimizeFor | None = None,
    max_memory: int | None = None,
    verify: bool = True,
    allow_pickle: bool = False,
    format: str | None = None,
    routing: Routing = "exact",
    passes: Sequence[str | AdapterPass | GraphPass] = (),
    max_rank: int | None = None,
    layout: Layout = "flat",
    genai_python: str | Path | None = None,
    profile: Sequence[str] = (),
    tensorrt_version: str | None = None,
    build: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
    rejected: Callable[[Path], object] | None = None,
) -> Bundle | Folder:
    """Compile one task of a checkpoint into a verified engine, or write it for other programs.

    Args:
        ckpt: folder of a native checkpoint or of the released EPT code.
        task: the task's name, an alias of it, or its id; None where the checkpoint has one. For
            `lora` and `triton` also several of them, a list or text with commas in it, or `all`.
        out: folder of the bundle: new, empty, or replaced with `force`.
        base: folder of the base model.
        target: what to write: `onnx`; `tensorrt`, the same of what TensorRT takes, with what
            builds its engines beside it; `lora`, a stock PEFT adapter for each task; `hf`, the
            folded model for transformers; `genai`, the same for onnxruntime-genai; `triton`, a
            model repository for Triton; or a target of an installed package.
        tasks: task names in id order, where the checkpoint does not store them.
        top_k: experts a task uses, where the checkpoint does not store it.
        task_spec: JSON file with prompts and labels of tasks that are not the published ones.
        probe: JSON lines file with examples to verify on; None for built-in text.
        precision: `fp32`; `keep`: matrices are stored in the base's own 16-bit type, folded ones
            rounded to it once, and computed in float32; `fp16` and `bf16`: stored and computed in
            16 bits where that is safe; `int8`: integers, activations quantised as they come;
            `int8-static`: activations too by ranges seen on `calibration`; `fp8`: likewise, in
            8-bit floating point, for TensorRT; `int8-fp16` and `fp8-fp16`: the same products, with
            fp16 for the rest; `int8-weights` and `int4`: weights alone, in
            blocks; `auto`: for each weight what the budget allows.
        precision_plan: JSON file with a level for each weight, as `precision.json` of a bundle
            that was built with `auto`; with `auto`, instead of a search.
        calibration: JSON lines file with texts to see the ranges of activations on; None, where
            the precision does not demand it: `data`, `probe` or the built-in text.
        calibration_method: how ranges follow from what was seen: `minmax`, `entropy` or
            `percentile`.
        block_method: how the scales of blocks are chosen: `rtn`, by the largest and smallest
            number, or `k-quant`, by least squares: slower, and a little nearer.
        data: JSON lines file with labelled examples that a lossy engine is scored on beside the
            exact one.
        max_drop: points (hundredths) of the task's metric that may be lost on `data`.
        max_flips: share of the rows of `data` whose label may change where the exact engine is
            sure. Where neither is given but `data` is, 0.01; for a regression, a point may be
            lost.
        search_evaluations: engines that a search for `auto` may try; None: 100.
        search_minutes: wall time after which it takes the best plan so far; None: no limit.
        optimize_for: the execution provider whose kernels the graphs are fused for, `cpu` or
            `cuda`; `any`: standard operators only; None: what the target is for, else `cpu`.
        max_memory: bytes that each process of the build may have resident; None: what is
            available now. Where the whole model does not fit it is verified block by block.
        verify: False publishes an engine nobody compared with anything; the manifest says so.
        allow_pickle: read `.bin` files (weights only).
        format: of the checkpoint, a name of `eptc.checkpoint.FORMATS` or of an installed package's
            format; None: what its folder looks like.
        routing: what becomes of routes that depend on the input. `exact`: what the system's own
            code does; `per-sample` and `batch`: each row by itself, or the rows of a batch
            together, where the system mixes them up; `frozen`: their mean over calibration text,
            folded, which is lossy.
        passes: exact passes of other packages to run beside eptc's own: `NAME` or
            `NAME:option=value,option=value` of an installed one, or the pass itself.
        max_rank: for `lora`: ranks above it are cut by a singular value decomposition, which is
            lossy; None: none is.
        layout: of a bundle: `flat`; `optimum`, which optimum-onnx's ORTModel classes load too; or
            `pack`: several tasks over one base, to be loaded with `eptc.Pack`.
        genai_python: for `genai`: an interpreter that has onnxruntime-genai; None: what the
            environment variable `EPTC_GENAI_PYTHON` names, else this one.
        profile: for `tensorrt`: sizes that engines are built for, `NAME=MIN:OPT:MAX` for a
            dimension; what is not named follows from the lengths of `probe`, or has a default.
        tensorrt_version: for `tensorrt`: what the graphs and the commands are for; None: the
            newest whose operators are known.
        build: for `tensorrt`: build the engines here and prove them too; needs the package
            `tensorrt` and a GPU.
        force: replace what lies at `out`.
        progress: called with each stage (a string), each finished pass and, while weights are
            written, how many are.
        rejected: called with the folder of an engine that was written and did not pass, before it
            is removed.

    Returns:
        The published bundle; for `lora`, `hf`, `genai` and `triton` the published folder.

    Raises:
        InputError: something about the input; nothing was written.
        ParityError: the engine does not give the reference's answers, or loses more of them than
            its precision or the budget allows; nothing was published.
    """
    options = Options(
        task, base, target, tasks, top_k, task_spec, probe, precision, precision_plan, calibration,
        calibration_method, block_method, data, max_drop, max_flips, search_evaluations,
        search_minutes, optimize_for, max_memory, verify, allow_pickle, format, routing,
        passes, max_rank, layout, genai_python, profile, tensorrt_version, build,
    )  # fmt: skip
    if folder_target(target, layout) is not None:
        return export_folder(ckpt, options, out=out, force=force, progress=progress)
    if target in REPOSITORIES:
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        settings = {**given, "target": "onnx"}
        del settings["task"]
        return export_repository(
            export, ckpt, options, settings, out=out, force=force, progress=progress
        )
    out = Path(out)
    bundle.check_place(out, force=force, inputs=options.inputs(ckpt))
    clock = Clock(progress)
    with contextlib.ExitStack() as stack:
        with clock.stage("read the checkpoint"):
            job = Job.read(ckpt, options)
            source = job.source
            if build:
                from eptc.tensorrt.build import build_engines, check_plan

                check_plan(job.plan)
            if layout == "optimum":
                check_layout(job)
            examples = _Examples.read(options, job)
        verifier = stack.enter_context(_verifier(job, examples.probe)) if verify else None
        # Hashing takes one processor, tracing another.
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        checked = pool.submit(source.check_base)
        with clock.stage("trace"):
            job.skeleton()
        with clock.stage("hash and check the base model"):
            checked.result()
        layers: dict[str, float] = {}
        with clock.stage("specialise and fold"):
            model, adapter_records = _rewrite(job, verifier, layers, progress)
        with clock.stage("graph passes"):
            graphs, records = job.bound(model), [*adapter_records]
            records += _told(run_graph_passes(graphs, job.graph_passes(), job.origins), progress)
            options.aim.target.check_graphs(graphs, job)

        draft = stack.enter_context(bundle.draft(out, force=force))
        if rejected is not None:
            stack.enter_context(_shown(draft.path, rejected))
        writer = _Writer(job, model, clock, progress)
        judge = _judge(job, model, verifier, layers, clock, progress)
        routed, frozen_notes = None, tuple[str, ...]()
        if routing == "frozen" and routes_on_input(model):
            routed = draft.path / "routed"
            routed.mkdir()
            manifest = writer.write(graphs, routed, records, "fp32")
            if judge is not None:
                judge.prove_exact(routed, manifest)
            with clock.stage("freeze the routers"):
                frozen = freeze(
                    model, graphs, routed, examples.texts, dtype=job.dtype, progress=progress
                )
            model, frozen_notes = frozen.model, frozen.notes
            records = [*adapter_records, *frozen.records]
            with clock.stage("graph passes"):
                graphs = job.bound(model)
                records += _told(
                    run_graph_passes(graphs, job.graph_passes(), job.origins), progress
                )
                options.aim.target.check_graphs(graphs, job)
            writer = _Writer(job, model, clock, progress)
            judge = _judge(job, model, verifier, layers, clock, progress)
        exact = None
        if job.needs_exact:
            exact = draft.path / "exact"
            exact.mkdir()
            manifest = writer.write(graphs, exact, records, "fp32")
            if judge is not None:
                judge.prove_exact(exact, manifest)
        lowered_notes: tuple[str, ...] = ()
        if job.scheme.lossy:
            from eptc.lossy import lower_precision

            with clock.stage("lower the precision"):
                lowered = lower_precision(
                    graphs, options, source.base.architecture, exact, plan=job.precision_plan,
                    texts=examples.texts, data=examples.data, progress=progress,
                )  # fmt: skip
            records += _told(lowered.records, progress)
            options.aim.target.check_graphs(graphs, job)
            lowered_notes = lowered.notes
            bundle.write_json(draft.path / PLAN, lowered.report)
        manifest = writer.write(graphs, draft.path, records, job.plan.stored)
        if judge is not None:
            if job.scheme.lossy:
                judge.prove_lossy(draft.path, routed or exact, examples.data)
            else:
                judge.prove_exact(draft.path, manifest)
                if routed is not None and examples.data is not None:
                    judge.score(
                        draft.path, routed, examples.data, "frozen routes",
                        "keep the routes with --routing exact, or give a larger budget "
                        "(--max-drop, --max-flips)",
                    )  # fmt: skip
            if routed is not None:
                changed = judge.compare_routed(draft.path, routed, examples.texts, examples.called)
                frozen_notes += examples.cautions(beside_routes(changed))
            manifest = judge.signed(draft.path, manifest)
        for folder in (exact, routed):
            if folder is not None:
                shutil.rmtree(folder)
        if layout == "optimum":
            with clock.stage("layout optimum"):
                manifest = lay_out(draft.path, manifest, verify=verify)
        if options.target != "onnx":
            with clock.stage(f"target {options.target}"):
                manifest = options.aim.add(draft.path, manifest)
        if build:
            with clock.stage("build and prove the engines"):
                subject = _subject(job, examples.probe)
                manifest = build_engines(draft.path, manifest, subject, progress)
        draft.publish()
    notes = (
        *source.contents.notes, *precise_routes(source, *job.task_ids), *examples.notes,
        *frozen_notes, *lowered_notes, *options.aim.target.notes(manifest),
    )  # fmt: skip
    return Bundle(draft.out, manifest, tuple(records), notes, clock.seconds)


def plan(ckpt: str | Path, **options: Any) -> Plan:
    """Predict what a build takes, before any weight is read.

    Args:
        ckpt: folder of the checkpoint.
        options: as for `export`, without `out`, `force` and `progress`.

    Raises:
        InputError: something about the input.
    """
    return Job.read(ckpt, Options(**options)).plan


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


def _judge(
    job: Job,
    model: AdaptedModel,
    verifier: Verifier | None,
    layers: Mapping[str, float],
    clock: Clock,
    progress: Progress,
) -> Judge | None:
    """Return who compares what is written; None where nothing is to be compared."""
    if verifier is None and job.options.data is None and job.options.routing != "frozen":
        return None
    from eptc.judge import Judge

    return Judge(job, model, verifier, layers, clock, progress)


def precise_routes(source: checkpoint.Checkpoint, *task_ids: int) -> tuple[str, ...]:
    """Return a warning for each linear whose choice of experts is within rounding of another."""
    notes = []
    for path, adapter in source.contents.adapters.items():
        router = adapter.router
        if router is None:
            continue
        for task_id in task_ids:
            margin = router.route(task_id).margin
            if margin < SMALL_MARGIN:
                task = source.contents.tasks[task_id].name
                notes.append(
                    f"{path}{f', task {task}' if len(task_ids) > 1 else ''}: the last expert "
                    f"chosen leads by only {margin:.1e} in log probability; arithmetic in "
                    "bfloat16 may choose another"
                )
    return tuple(notes)


@dataclasses.dataclass(frozen=True)
class _Examples:
    """The texts a build was given.

    Args:
        probe: to verify on, by task where there are several; None for the built-in ones.
        data: labelled ones to score on; None where there are none.
        texts: what ranges of activations are seen on.
        notes: what a user should know about them.
        called: what `texts` are, for people.
    """

    probe: Sequence[Example] | Mapping[str, Sequence[Example]] | None = None
    data: Sequence[Mapping[str, Any]] | None = None
    texts: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    called: str = "the calibration text"

    @classmethod
    def read(cls, options: Options, job: Job) -> _Examples:
        if not (options.probe or options.data or options.calibrated):
            return cls()
        if job.several:  # and nothing but probes is taken
            assert options.probe is not None
            return cls(read_task_examples(Path(options.probe), job.tasks))
        task = job.task
        from eptc.calibration import read_calibration
        from eptc.parity_gate import builtin_examples, read_examples

        probe = None if options.probe is None else read_examples(Path(options.probe), task)
        data = None
        if options.data is not None:
            data = read_examples(Path(options.data), task, labelled=True)
            if len({example["label"] for example in data}) < 2:
                raise InputError(
                    f"every row of {options.data} has the label {data[0]['label']!r}",
                    expected="rows of several labels: of one alone there is no score",
                )
        if options.calibration is None:
            called = "labelled data" if data else "probes" if probe else "built-in sentences"
            texts = data or probe or builtin_examples(task)
            return cls(probe, data, texts, called=f"the {called}")
        texts, notes = read_calibration(Path(options.calibration), task)
        return cls(probe, data, texts, notes)

    def cautions(self, found: str) -> tuple[str, ...]:
        """Return a warning where gates were only judged on the text that their means are of.

        Args:
            found: what that judgement was.
        """
        seen = [_fields(text) for text in self.texts]
        if self.data is not None and not any(_fields(row) in seen for row in self.data):
            return ()
        built_in = self.called == "the built-in sentences"
        return (
            f"{found}; the means of the gates were taken from the same text, so that is no "
            "measure on held-out data"
            + ("; nor is it the task's own text: give that with --calibration" if built_in else "")
            + "; score other rows with --data",
        )


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example without its label."""
    return {name: value for name, value in row.items() if name != "label"}


def _told(records: Sequence[PassRecord], progress: Progress) -> Sequence[PassRecord]:
    for record in records:
        progress(record)
    return records


class _Writer:
    """Writes engines of one model."""

    def __init__(self, job: Job, model: AdaptedModel, clock: Clock, progress: Progress) -> None:
        self._job = job
        self._model = model
        self._clock = clock
        self._progress = progress
        source = job.source
        self._tokenizer = text.find_tokenizer(source.path, source.base.path)
        self._generation = text.generation_config(source.base.path)

    def write(
        self,
        graphs: Mapping[str, onnx_ir.Model],
        directory: Path,
        records: Sequence[PassRecord],
        precision: str,
    ) -> Manifest:
        """Write a bundle that nobody has compared with anything."""
        job, model = self._job, self._model
        with self._clock.stage("write"):
            digests = lower.write(
                graphs, directory, threads=WRITERS, in_flight=job.plan.in_flight,
                progress=lambda done, total: self._progress(Written(done, total)),
            )  # fmt: skip
            # Settings that config.json leaves out have the values transformers gives them.
            settings = {**job.config.to_dict(), **model.config}
            manifest = describe(
                job.source, job.task_ids, settings, self._generation, graphs, self._tokenizer,
                records, precision=precision, optimize_for=job.options.provider,
                plugins=job.plugins,
            )  # fmt: skip
            write_texts(directory, job.source, model, self._generation, self._tokenizer)
            return bundle.write_manifest(directory, manifest, digests)


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

    by_block = job.plan.verification == "block by block"
    return Subject(job.source, _asked(job), examples, by_block)


def _asked(job: Job) -> str | int | Sequence[str | int]:
    """Return the task, or tasks, as the caller named them."""
    return 0 if job.options.task is None else job.options.task


def _rewrite(
    job: Job, verifier: Verifier | None, layers: dict[str, float], progress: Progress
) -> tuple[AdaptedModel, list[PassRecord]]:
    """Run the adapter passes; with a reference, each is followed by the layer gate."""
    passes, task_ids, model = job.adapter_passes(), job.task_ids, job.model
    if verifier is None:
        return run_adapter_passes(
            model, passes, task_id=task_ids, probe=None, after=lambda record, _: progress(record),
            origins=job.origins,
        )  # fmt: skip
    from eptc.parity_gate import LayerGate

    stage = f"the {job.source.contents.format} reader"
    gate = LayerGate(verifier.layers())
    layers[stage] = gate.check(model, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        stage = f"the pass {record.label}"
        layers[stage] = gate.check(model, stage)
        progress(record)

    return run_adapter_passes(
        model, passes, task_id=task_ids, probe=gate.probe, after=after, origins=job.origins
    )
