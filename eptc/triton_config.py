"""What Triton reads of a model, as text: `config.pbtxt`, a `ModelConfig` of model_config.proto."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import GraphSpec, TensorSpec

__all__ = ["LABELS", "MAX_BATCH", "model_config", "model_labels"]

LABELS = "labels.txt"

# Rows that Triton puts into one run. A user may change it: the graphs take any number.
MAX_BATCH = 32
# How long a request waits for others: less than most models need for one row.
_MAX_DELAY_MICROSECONDS = 1000

_TYPES = {
    "bfloat16": "TYPE_BF16",
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
_KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU", "any": "KIND_AUTO"}

_BATCH = "batch"
# What a warm-up gives to symbolic dimensions: with a cache one more token, else a short text.
_TOKENS, _PAST = 8, "past_sequence"


def model_config(name: str, manifest: Manifest, graph: GraphSpec) -> str:
    """Return the configuration of one graph of an engine.

    Where each input and output has a row for each row of the batch, Triton adds that dimension
    itself, and puts the rows of several requests of one shape into one run; where the rows of a
    batch change one another's answers it does not.

    Args:
        name: of the model, which is the name of its folder.
        manifest: the engine's.
        graph: one of its graphs; its file lies in the folder of the version.
    """
    tensors = [*graph.inputs, *graph.outputs]
    batched = all(tensor.shape[:1] == (_BATCH,) for tensor in tensors)
    labels = LABELS if model_labels(manifest) else None
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_text(PurePath(graph.file).name)}",
        f"max_batch_size: {MAX_BATCH if batched else 0}",
    ]
    for tensor in graph.inputs:
        lines += _block("input", _tensor(tensor, batched=batched))
    for tensor in graph.outputs:
        named = [f"label_filename: {_text(labels)}"] if labels and tensor.name == "logits" else []
        lines += _block("output", [*_tensor(tensor, batched=batched), *named])
    lines += _block("instance_group", ["count: 1", f"kind: {_KINDS[manifest.optimized_for]}"])
    if batched and manifest.routing.mode != "batch":
        delay = f"max_queue_delay_microseconds: {_MAX_DELAY_MICROSECONDS}"
        lines += _block("dynamic_batching", [delay])
    lines += _block("model_warmup", _warm_up(graph.inputs, batched=batched))
    return "\n".join(lines) + "\n"


def model_labels(manifest: Manifest) -> Sequence[str]:
    """Return what a classifier's logits are called in order; empty where they have no names."""
    task = manifest.task
    if manifest.kind != "encoder-classifier" or task is None:
        return ()
    if any("\n" in label or "\r" in label for label in task.labels):
        return ()  # the file has a line for each
    return task.labels


def _tensor(tensor: TensorSpec, *, batched: bool) -> list[str]:
    dims = [size if isinstance(size, int) else -1 for size in _shape(tensor, batched=batched)]
    lines = [f"name: {_text(tensor.name)}", f"data_type: {_TYPES[tensor.dtype]}"]
    if dims:
        return [*lines, f"dims: {dims}"]
    # A number for each row: Triton wants a dimension, the graph does not.
    return [*lines, "dims: [1]", "reshape { shape: [] }"]


def _warm_up(inputs: Sequence[TensorSpec], *, batched: bool) -> Iterator[str]:
    """Yield a request of zeros, so that the first real one does not wait for what happens once."""
    cached = any(_PAST in tensor.shape for tensor in inputs)
    sizes = {"sequence": 1, "total_sequence": _TOKENS + 1} if cached else {}
    yield 'name: "zeros"'
    yield "batch_size: 1"
    for tensor in inputs:
        dims = [_size(size, sizes) for size in _shape(tensor, batched=batched)] or [1]
        value = _block(
            "value", [f"data_type: {_TYPES[tensor.dtype]}", f"dims: {dims}", "zero_data: true"]
        )
        yield from _block("inputs", [f"key: {_text(tensor.name)}", *value])


def _shape(tensor: TensorSpec, *, batched: bool) -> tuple[int | str, ...]:
    """Return the dimensions that a request has."""
    return tensor.shape[1:] if batched else tensor.shape


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    return 1 if size == _BATCH else sizes.get(size, _TOKENS)


def _block(name: str, lines: Sequence[str] | Iterator[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _text(value: str) -> str:
    """Quote a name; those of models, files and tensors are ASCII."""
    return json.dumps(value)
