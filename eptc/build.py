"""From a checkpoint to a published bundle: the whole road, in order."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir

from eptc import bundle, checkpoint, lower, text
from eptc.describe import OPSET, describe, write_texts
from eptc.errors import (
    BaseModelError,
    BundleError,
    CheckpointError,
    OptionError,
    ParityError,
    TaskError,
)
from eptc.ir import AdaptedModel
from eptc.pipeline import (
    PassRecord,
    adapter_passes,
    graph_passes,
    run_adapter_passes,
    run_graph_passes,
)
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest
from eptc.skeletons import known_parameters, skeleton
from eptc.tasks import Task, resolve
from eptc.tensors import as_dtype

if TYPE_CHECKING:
    from eptc.nn import EptModel
    from eptc.parity_gate import ParityReport

__all__ = ["TARGETS", "Bundle", "Event", "export", "fits", "precise_routes"]

TARGETS = ("onnx",)
# A log-probability gap below this can flip under other float32 arithmetic.
SMALL_MARGIN = 1e-4

# What transformers raises where a configuration has values of the wrong kind.
_BAD_CONFIG = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip

Event = str | PassRecord
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


class _Clock:
    """Wall time by stage; reports each stage as it starts."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Any:
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
        verify: False publishes an engine nobody compared with anything; the manifest says so.
        allow_pickle: read `adapter_model.bin` (weights only).
        force: replace what lies at `out`.
        progress: called with each stage (a string) and each finished pass.

    Returns:
        The published bundle.

    Raises:
        InputError: something about the input; nothing was written.
        ParityError: the engine does not give the reference's answers; nothing was published.
    """
    if target not in TARGETS:
        raise OptionError(f"the target is {target!r}", expected=" or ".join(TARGETS))
    out = Path(out)
    bundle.check_place(
        out,
        force=force,
        inputs={
            "the checkpoint": ckpt, "the base model": base, "the probes": probe,
            "the task description": task_spec,
        },
    )  # fmt: skip
    clock = _Clock(progress)
    with clock.stage("read the checkpoint"):
        source = checkpoint.read(
            Path(ckpt),
            Path(base) if base is not None else None,
            top_k=top_k,
            tasks=tasks,
            task_spec=Path(task_spec) if task_spec is not None else None,
            allow_pickle=allow_pickle,
        )
        task_id = resolve(task, source.contents.tasks)
        config = _task_config(source, task_id)
        fits(source, task_id, config)
        examples = _examples(probe, source.contents.tasks[task_id], verify)
        tokenizer = text.find_tokenizer(source.path, source.base.path)
        generation = text.generation_config(source.base.path)
    with clock.stage("hash and check the base model"):
        source.check_base()
    reference = None
    if verify:
        from eptc.parity_gate import load_reference

        with clock.stage("load the PyTorch reference"):
            reference = load_reference(source, top_k=top_k, tasks=tasks, allow_pickle=allow_pickle)

    # The reference finds the task by itself: a reader that mixes up tasks is found out.
    twin = (reference, resolve(task, reference.tasks)) if reference is not None else None
    layers: dict[str, float] = {}
    with clock.stage("specialise and fold"):
        model, records = _rewrite(source, task_id, twin, layers, progress)
    with clock.stage("trace"):
        graphs = _bound(config, model, source.base.tied_head)
    with clock.stage("graph passes"):
        graph_records = run_graph_passes(graphs, graph_passes("cpu"))
        for record in graph_records:
            progress(record)
    records += graph_records

    with bundle.draft(out, force=force) as draft:
        with clock.stage("write"):
            lower.write(graphs, draft.path)
            # Settings that config.json leaves out have the values transformers gives them.
            settings = {**config.to_dict(), **model.config}
            manifest = describe(source, task_id, settings, generation, graphs, tokenizer, records)
            write_texts(draft.path, source, model, generation, tokenizer)
        if twin is not None:
            with clock.stage("parity"):
                manifest = bundle.write_manifest(draft.path, manifest)
                prove = _prover(twin, tokenizer, examples, layers, progress)
                report = prove(draft.path)
                if not report.passed:
                    _refuse(
                        report, config, model, source.base.tied_head, manifest, draft.path, prove
                    )
                bundle.write_json(draft.path / "parity.json", report.to_json())
                manifest = dataclasses.replace(manifest, parity=report.summary())
        manifest = bundle.write_manifest(draft.path, manifest)
        draft.publish()
    notes = precise_routes(source, task_id)
    return Bundle(draft.out, manifest, tuple(records), notes, clock.seconds)


def fits(source: checkpoint.Checkpoint, task_id: int, config: Any) -> None:
    """Check that base and heads have every parameter of the task model in its shape, no other.

    Raises:
        BaseModelError: the first three that are missing, of another shape or without a place.
        CheckpointError: a head's parameter that the task model does not have.
        TaskError: the task's kind does not go with the model.
    """
    task = source.contents.tasks[task_id]
    encoder = source.base.architecture.kind == "encoder-classifier"
    if encoder != (task.kind in ("classification", "regression")):
        raise TaskError(
            f"task {task.name!r} is a {task.kind} task, the base is a "
            f"{source.base.config.get('model_type')} {source.base.architecture.kind}",
            expected="classification or regression" if encoder else "text-to-text or generation",
            fix="describe the task with --task-spec"
            if source.contents.format == "released"
            else None,
        )
    head = source.contents.heads.get(task.name, {})
    found = {**source.base.weights, **head}
    expected = _expected_parameters(source, config)
    wrong = []
    for name, shape in expected.items():
        if name not in found:
            wrong.append(f"{name} {list(shape)} is missing")
        elif found[name].shape != shape:
            wrong.append(f"{name} is {list(found[name].shape)}, not {list(shape)}")
    if wrong:
        raise BaseModelError(
            f"the base model {source.base.path} does not fit its configuration in {len(wrong)} "
            f"tensors: {'; '.join(wrong[:3])}",
            expected=f"the parameters of {source.base.architecture.task_class}"
            + ("" if head or not encoder else f", or a head for task {task.name!r}"),
            fix="give a complete base model with --base",
        )
    if lost := sorted(set(source.base.weights) - set(expected)):
        raise BaseModelError(
            f"the base model {source.base.path} has {len(lost)} tensors without a place in the "
            f"model that its config.json describes: {', '.join(lost[:3])}",
            expected=f"the parameters of {source.base.architecture.task_class}",
            fix="give a base model with its own config.json",
        )
    for name, parameters in source.contents.heads.items():
        if lost := sorted(set(parameters) - set(expected)):
            raise CheckpointError(
                f"the head of task {name!r} in {source.path} has the parameter {lost[0]}",
                expected=f"parameters of {source.base.architecture.task_class}",
            )


def _expected_parameters(
    source: checkpoint.Checkpoint, config: Any
) -> Mapping[str, tuple[int, ...]]:
    try:
        return known_parameters(config, opset=OPSET, tied_head=source.base.tied_head)
    except _BAD_CONFIG as error:
        raise _no_model(source, error) from error


def _no_model(source: checkpoint.Checkpoint, error: Exception) -> BaseModelError:
    return BaseModelError(
        f"{source.base.path / 'config.json'} describes no model that transformers can build: "
        f"{type(error).__name__}: {error}",
        expected=f"the configuration of a {source.base.architecture.task_class}",
        fix="give the base model with its own config.json",
    )


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


def _task_config(source: checkpoint.Checkpoint, task_id: int) -> Any:
    """Return the configuration transformers builds the task model from."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    fixed = adapter_passes(task_id)[0].rewrite(source.model)
    try:
        return CONFIG_MAPPING[str(fixed.config["model_type"])].from_dict(dict(fixed.config))
    except (*_BAD_CONFIG, StrictDataclassError) as error:
        raise _no_model(source, error) from error


def _bound(config: Any, model: AdaptedModel, tied_head: bool) -> dict[str, onnx_ir.Model]:
    """Return the graphs of a configuration with a model's weights, none of them read."""
    graphs = skeleton(config, opset=OPSET, tied_head=tied_head).copy_graphs()
    lower.bind(graphs, {name: as_dtype(t, "float32") for name, t in model.weights.items()})
    return graphs


def _examples(
    probe: str | Path | None, task: Task, verify: bool
) -> list[Mapping[str, Any]] | None:
    if probe is None:
        return None
    if not verify:
        raise OptionError("--probe was given together with --no-verify", fix="leave one out")
    from eptc.parity_gate import read_examples

    return read_examples(Path(probe), task)


def _rewrite(
    source: checkpoint.Checkpoint,
    task_id: int,
    twin: tuple[EptModel, int] | None,
    layers: dict[str, float],
    progress: Progress,
) -> tuple[AdaptedModel, list[PassRecord]]:
    """Run the adapter passes; with a reference, each is followed by the layer gate."""
    if twin is None:
        return run_adapter_passes(
            source.model,
            adapter_passes(task_id),
            task_id=task_id,
            probe=None,
            after=lambda record, _: progress(record),
        )
    from eptc.parity_gate import LayerGate

    stage = f"the {source.contents.format} reader"
    gate = LayerGate(*twin)
    layers[stage] = gate.check(source.model, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        stage = f"the pass {record.name}"
        layers[stage] = gate.check(model, stage)
        progress(record)

    passes = adapter_passes(task_id)
    return run_adapter_passes(source.model, passes, task_id=task_id, probe=gate.probe, after=after)


def _prover(
    twin: tuple[EptModel, int],
    tokenizer: text.TrainingTokenizer | None,
    examples: Sequence[Mapping[str, Any]] | None,
    layers: Mapping[str, float],
    progress: Progress,
) -> Callable[[Path], ParityReport]:
    """Return what compares the bundle in a folder with the reference."""
    from eptc.parity_gate import prove

    def compare(directory: Path) -> ParityReport:
        try:
            engine = Engine.load(directory, providers=["cpu"])
        except BundleError as error:
            raise ParityError(f"the engine that was written does not load: {error}") from error
        with engine:
            return prove(
                directory, engine, *twin, tokenizer,
                examples=examples, layers=layers, progress=progress,
            )  # fmt: skip

    return compare


def _refuse(
    report: ParityReport,
    config: Any,
    model: AdaptedModel,
    tied_head: bool,
    manifest: Manifest,
    directory: Path,
    prove: Callable[[Path], ParityReport],
) -> None:
    """Raise ParityError and name the first step after which the engine is off.

    Every linear and every weight agreed with the reference, so the graph is wrong: it is built
    again with one graph pass more each time.
    """
    from eptc.parity_gate import refuse

    steps = graph_passes("cpu")
    guilty = f"the pass {steps[-1].name}"
    written = {lower.WEIGHTS, *(graph.file for graph in manifest.graphs.values())}
    for count in range(len(steps)):
        graphs = _bound(config, model, tied_head)
        run_graph_passes(graphs, steps[:count])
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            trial = Path(folder)
            for name in manifest.files:
                if name not in written:
                    shutil.copy(directory / name, trial / name)
            lower.write(graphs, trial)
            bundle.write_manifest(trial, dataclasses.replace(manifest, files={}))
            if not prove(trial).passed:
                guilty = f"the pass {steps[count - 1].name}" if count else "the lowering"
                break
    refuse(report, f"{guilty} is the first step after which the engine is off: report this bug")
