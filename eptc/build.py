"""From a checkpoint to a published bundle: the whole road, in order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir

from eptc import bundle, checkpoint, lower, text
from eptc.errors import BaseModelError, OptionError, TaskError
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
from eptc.runtime.spec import GenerationSpec, GraphSpec, TensorSpec
from eptc.tasks import Task, resolve
from eptc.tensors import as_dtype

if TYPE_CHECKING:
    from eptc.nn import EptModel
    from eptc.parity_gate import ParityReport

__all__ = ["TARGETS", "Bundle", "Event", "export", "fits", "precise_routes"]

TARGETS = ("onnx",)
OPSET = 20

# A log-probability gap below this can flip under other float32 arithmetic.
SMALL_MARGIN = 1e-4

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
    bundle.check_place(out, force=force)
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
        graphs = _traced(config)
    lower.bind(graphs, {name: as_dtype(t, "float32") for name, t in model.weights.items()})
    with clock.stage("graph passes"):
        graph_records = run_graph_passes(graphs, graph_passes())
        for record in graph_records:
            progress(record)
    records += graph_records

    with bundle.draft(out, force=force) as draft:
        with clock.stage("write"):
            lower.write(graphs, draft.path)
            manifest = _describe(source, task_id, model, graphs, tokenizer, records)
            _write_texts(draft.path, source, model, tokenizer)
        if twin is not None:
            with clock.stage("parity"):
                manifest = bundle.write_manifest(draft.path, manifest)
                report = _prove(draft.path, twin, tokenizer, examples, layers, progress)
                bundle.write_json(draft.path / "parity.json", report.to_json())
                manifest = dataclasses.replace(manifest, parity=report.summary())
        manifest = bundle.write_manifest(draft.path, manifest)
        draft.publish()
    notes = precise_routes(source, task_id)
    return Bundle(draft.out, manifest, tuple(records), notes, clock.seconds)


def fits(source: checkpoint.Checkpoint, task_id: int, config: Any) -> None:
    """Check that base and head have every parameter of the task model in its shape.

    Raises:
        BaseModelError: the first three that are missing or of another shape.
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
    wrong = []
    for name, shape in lower.expected_parameters(config).items():
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
    from transformers import CONFIG_MAPPING

    fixed = adapter_passes(task_id)[0].rewrite(source.model)
    return CONFIG_MAPPING[str(fixed.config["model_type"])].from_dict(dict(fixed.config))


@functools.lru_cache(maxsize=4)
def _skeleton(config: str, model_type: str) -> dict[str, onnx_ir.Model]:
    from transformers import CONFIG_MAPPING

    return lower.trace(CONFIG_MAPPING[model_type].from_dict(json.loads(config)), opset=OPSET)


def _traced(config: Any) -> dict[str, onnx_ir.Model]:
    """Return unbound graphs of a configuration; tasks of one checkpoint share the trace."""
    skeleton = _skeleton(json.dumps(config.to_dict(), sort_keys=True), config.model_type)
    return {key: model.clone() for key, model in skeleton.items()}


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
            measure=False,
            after=lambda record, _: progress(record),
        )
    from eptc.parity_gate import check_layers

    stage = f"the {source.contents.format} reader"
    layers[stage] = check_layers(source.model, *twin, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        stage = f"the pass {record.name}"
        layers[stage] = check_layers(model, *twin, stage)
        progress(record)

    return run_adapter_passes(source.model, adapter_passes(task_id), task_id=task_id, after=after)


def _describe(
    source: checkpoint.Checkpoint,
    task_id: int,
    model: AdaptedModel,
    graphs: Mapping[str, onnx_ir.Model],
    tokenizer: text.TrainingTokenizer | None,
    records: Sequence[PassRecord],
) -> Manifest:
    kind = source.base.architecture.kind
    task = source.contents.tasks[task_id]
    specs = {key: _graph_spec(key, graph) for key, graph in graphs.items()}
    inputs = {tensor.name for spec in specs.values() for tensor in spec.inputs}
    return Manifest(
        kind=kind,
        target="onnx",
        opset=OPSET,
        precision="fp32",
        task=task,
        num_labels=task.num_outputs if kind == "encoder-classifier" else None,
        vocab_size=int(model.config["vocab_size"]),
        graphs=specs,
        generation=None
        if kind == "encoder-classifier"
        else _generation(source, task, specs, tokenizer),
        tokenizer=tokenizer.spec(
            model.config, task, kind=kind, token_types="token_type_ids" in inputs
        )
        if tokenizer is not None
        else None,
        passes=tuple(record.to_json() for record in records),
        checkpoint={
            "format": source.contents.format,
            "variant": source.contents.variant,
            "sha256": source.sha256,
            "task_id": task_id,
            "top_k": source.contents.top_k,
            "kernel_sizes": list(source.contents.kernel_sizes),
            "tasks": [task.to_json() for task in source.contents.tasks],
        },
        base={
            "model_type": source.base.config["model_type"],
            "sha256": source.base.sha256,
            "unused": list(source.base.unused),
        },
        tools={
            name: importlib.metadata.version(name)
            for name in ("ept-compiler", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")
        },
        files={},
        parity={"verified": False},
    )


def _graph_spec(key: str, graph: onnx_ir.Model) -> GraphSpec:
    def tensors(values: Sequence[onnx_ir.Value]) -> tuple[TensorSpec, ...]:
        found = []
        for value in values:
            assert value.shape is not None
            assert value.dtype is not None
            shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
            found.append(TensorSpec(str(value.name), value.dtype.numpy().name, shape))
        return tuple(found)

    return GraphSpec(f"{key}.onnx", tensors(graph.graph.inputs), tensors(graph.graph.outputs))


def _generation(
    source: checkpoint.Checkpoint,
    task: Task,
    specs: Mapping[str, GraphSpec],
    tokenizer: text.TrainingTokenizer | None,
) -> GenerationSpec:
    """Return how the engine starts, stops and sizes its cache.

    The generation configuration has the last word on special tokens, as in transformers.
    """
    config = {**source.base.config, **text.generation_config(source.base.path)}
    stops = config.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    decoder = specs.get("decoder", specs.get("model"))
    assert decoder is not None
    caches = [s for s in decoder.inputs if s.name.startswith("past_key_values.")]
    heads, width = caches[0].shape[1], caches[0].shape[3]
    layers = {spec.name.split(".")[1] for spec in caches}
    return GenerationSpec(
        decoder_start_token_id=config.get("decoder_start_token_id", config.get("pad_token_id"))
        if source.base.architecture.kind == "encoder-decoder"
        else None,
        eos_token_id=tuple(int(stop) for stop in stops),
        pad_token_id=text.pad_token_id(config),
        max_new_tokens=text.answer_length(task, tokenizer, source.contents.variant),
        num_layers=len(layers),
        num_key_value_heads=int(heads),
        head_dim=int(width),
        max_positions=text.max_positions(source.base.config),
    )


def _write_texts(
    directory: Path,
    source: checkpoint.Checkpoint,
    model: AdaptedModel,
    tokenizer: text.TrainingTokenizer | None,
) -> None:
    """Write the configuration, the generation configuration and the tokenizer's files."""
    config = {key: model.config[key] for key in sorted(model.config) if key != "_name_or_path"}
    bundle.write_json(directory / "config.json", config)
    if source.base.architecture.kind != "encoder-classifier":
        generation = text.generation_config(source.base.path)
        bundle.write_json(directory / "generation_config.json", dict(sorted(generation.items())))
    if tokenizer is not None:
        tokenizer.write(directory)


def _prove(
    directory: Path,
    twin: tuple[EptModel, int],
    tokenizer: text.TrainingTokenizer | None,
    examples: Sequence[Mapping[str, Any]] | None,
    layers: Mapping[str, float],
    progress: Progress,
) -> ParityReport:
    """Return the report of a bundle that passed; refuse one that did not."""
    from eptc.parity_gate import prove, refuse

    with Engine.load(directory, providers=["cpu"]) as engine:
        report = prove(
            directory, engine, *twin, tokenizer,
            examples=examples, layers=layers, progress=progress,
        )  # fmt: skip
    refuse(
        report,
        "every linear and every weight agrees with the reference, so the graph itself is wrong: "
        "a bug in the lowering or in a graph pass; report it",
    )
    return report
