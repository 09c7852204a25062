"""What a bundle says about itself: the manifest, the configuration and the tokenizer's files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from eptc import bundle, text
from eptc.checkpoint import Checkpoint
from eptc.ir import AdaptedModel
from eptc.plugins import Plugin
from eptc.run_passes import PassRecord
from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import GenerationSpec, GraphSpec, TensorSpec
from eptc.tasks import Task

__all__ = ["OPSET", "checkpoint_entry", "describe", "tool_versions", "write_texts"]

OPSET = 20


def describe(
    source: Checkpoint,
    task_ids: Sequence[int],
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    graphs: Mapping[str, onnx_ir.Model],
    tokenizer: text.TrainingTokenizer | None,
    records: Sequence[PassRecord],
    *,
    precision: str,
    optimize_for: str,
    plugins: Sequence[Plugin] = (),
) -> Manifest:
    """Return the manifest of an engine that nobody has compared with anything yet.

    Args:
        source: the checkpoint.
        task_ids: the task the engine is for, or each where there are several.
        settings: the task model's configuration, every setting in it.
        generation: the base's generation configuration.
        graphs: the engine's graphs.
        tokenizer: the tokenizer of training.
        records: what the passes did.
        precision: what the matrices are stored as.
        optimize_for: the execution provider the graphs are fused for.
        plugins: packages that the build used beside eptc.
    """
    kind = source.base.architecture.kind
    tasks = tuple(source.contents.tasks[task_id] for task_id in task_ids)
    task = tasks[0] if len(tasks) == 1 else None
    specs = {key: _graph_spec(key, graph) for key, graph in graphs.items()}
    inputs = {tensor.name for spec in specs.values() for tensor in spec.inputs}
    return Manifest(
        kind=kind,
        target="onnx",
        opset=OPSET,
        precision=precision,
        optimized_for=optimize_for,
        task=task,
        tasks=() if task is not None else tasks,
        num_labels=max(each.num_outputs for each in tasks)
        if kind == "encoder-classifier"
        else None,
        vocab_size=int(settings["vocab_size"]),
        graphs=specs,
        generation=None
        if kind == "encoder-classifier"
        else _generation(source, tasks, {**settings, **generation}, specs, tokenizer),
        tokenizer=tokenizer.spec(
            settings,
            task,
            kind=kind,
            token_types="token_type_ids" in inputs,
            taken=0 if source.contents.prompts is None else source.contents.prompts.length,
        )
        if tokenizer is not None
        else None,
        passes=tuple(record.to_json() for record in records),
        routing=source.contents.routing,
        checkpoint=checkpoint_entry(
            source,
            **({"task_ids": list(task_ids)} if task is None else {"task_id": task_ids[0]}),
        ),
        base={
            "model_type": source.base.config["model_type"],
            "sha256": source.base.sha256,
            "unused": list(source.base.unused),
        },
        tools=tool_versions(("onnx", "onnx-ir", "onnxscript"), plugins),
        files={},
        parity={"verified": False},
    )


def checkpoint_entry(source: Checkpoint, **more: Any) -> dict[str, Any]:
    """Return what is said of the checkpoint something was made from: JSON values."""
    return {
        "format": source.contents.format,
        "variant": source.contents.variant,
        "sha256": source.sha256,
        **more,
        "top_k": source.contents.top_k,
        "kernel_sizes": list(source.contents.kernel_sizes),
        "tasks": [task.to_json() for task in source.contents.tasks],
        **source.contents.details,
        **({} if source.format.plugin is None else {"origin": str(source.format.plugin)}),
    }


def tool_versions(names: Sequence[str], plugins: Sequence[Plugin] = ()) -> dict[str, str]:
    """Return the versions of eptc, of what it always builds with, of some packages and plugins."""
    every = ("ept-compiler", *names, "torch", "transformers")
    found = {name: importlib.metadata.version(name) for name in every}
    return found | {plugin.distribution: plugin.version for plugin in plugins}


def _graph_spec(key: str, graph: onnx_ir.Model) -> GraphSpec:
    def tensors(values: Sequence[onnx_ir.Value]) -> tuple[TensorSpec, ...]:
        found = []
        for value in values:
            assert value.shape is not None
            assert value.dtype is not None
            shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
            found.append(TensorSpec(str(value.name), value.dtype.numpy().name, shape))
        return tuple(found)

    # An input with an initializer need not be fed.
    fed = [value for value in graph.graph.inputs if not value.is_initializer()]
    return GraphSpec(f"{key}.onnx", tensors(fed), tensors(graph.graph.outputs))


def _generation(
    source: Checkpoint,
    tasks: Sequence[Task],
    config: Mapping[str, Any],
    specs: Mapping[str, GraphSpec],
    tokenizer: text.TrainingTokenizer | None,
) -> GenerationSpec:
    """Return how the engine starts, stops and sizes its cache.

    In `config` the generation configuration has the last word on special tokens, as in
    transformers.
    """
    start = config.get("decoder_start_token_id")
    stops = config.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    decoder = specs.get("decoder", specs.get("model"))
    assert decoder is not None
    caches = [s for s in decoder.inputs if s.name.startswith("past_key_values.")]
    heads, width = caches[0].shape[1], caches[0].shape[3]
    layers = {spec.name.split(".")[1] for spec in caches}
    kind, variant = source.base.architecture.kind, source.contents.variant
    lengths = tuple(text.answer_length(task, tokenizer, variant) for task in tasks)
    prefix, ends = text.answer_frame(tokenizer, kind, variant)
    return GenerationSpec(
        decoder_start_token_id=(config.get("pad_token_id") if start is None else start)
        if kind == "encoder-decoder"
        else None,
        eos_token_id=tuple(int(stop) for stop in stops),
        pad_token_id=text.pad_token_id(config),
        max_new_tokens=max(lengths),
        task_max_new_tokens=lengths if len(tasks) > 1 else (),
        num_layers=len(layers),
        num_key_value_heads=int(heads),
        head_dim=int(width),
        max_positions=text.max_positions(config),
        answer_prefix=prefix,
        answer_ends=ends,
    )


def write_texts(
    directory: Path,
    source: Checkpoint,
    model: AdaptedModel,
    generation: Mapping[str, Any],
    tokenizer: text.TrainingTokenizer | None,
) -> None:
    """Write the configuration, the generation configuration and the tokenizer's files."""
    config = {key: model.config[key] for key in sorted(model.config) if key != "_name_or_path"}
    bundle.write_json(directory / "config.json", config)
    if source.base.architecture.kind != "encoder-classifier":
        bundle.write_json(directory / "generation_config.json", dict(sorted(generation.items())))
    if tokenizer is not None:
        tokenizer.write(directory)
