"""One task of a pack: its factors and its head, and what the manifest says of it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir

from eptc import bundle, text
from eptc.checkpoint import Checkpoint
from eptc.describe import describe
from eptc.errors import BundleError, CheckpointError
from eptc.files import sha256
from eptc.fitting import task_config
from eptc.interop.lora_files import low_ranks
from eptc.ir import AdaptedModel
from eptc.ir.folding import folded
from eptc.job import Progress
from eptc.pipeline import factoring_passes
from eptc.run_passes import PassRecord, run_adapter_passes
from eptc.runtime.manifest import Manifest
from eptc.runtime.pack_spec import PackTask
from eptc.runtime.pack_tensors import factor_names
from eptc.runtime.spec import FileRecord, file_name
from eptc.tensors import Array, as_dtype

if TYPE_CHECKING:
    from eptc.parity_gate.packs import PackGate

__all__ = [
    "ADAPTER",
    "Factored",
    "adapter_file",
    "check_factors",
    "describe_task",
    "factor",
    "task_tensors",
    "write_adapter",
]

# ONNX Runtime's suffix of adapter files.
ADAPTER = ".onnx_adapter"
# Characters of a task's name that a file is called by.
_LONGEST = 100


@dataclasses.dataclass(frozen=True)
class Factored:
    """A task whose linears have at most one plain low rank each.

    Args:
        task_id: position in its checkpoint.
        model: specialised and factored.
        records: what the passes did.
        layers: outcome of the layer gate by stage; empty without a reference.
    """

    task_id: int
    model: AdaptedModel
    records: tuple[PassRecord, ...]
    layers: dict[str, float]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The adapted linears, [out, in] by path."""
        found = {}
        for path in sorted(self.model.adapters):
            out, columns = self.model.weights[f"{path}.weight"].shape
            found[path] = out, columns
        return found


def check_factors(source: Checkpoint) -> None:
    """Raise CheckpointError for what no factors beside a linear can say."""
    contents = source.contents
    found = f"{source.path} ({contents.format}, {contents.variant})"
    fix = "export each task by itself, with --layout flat"
    routed = sorted(path for path, a in contents.adapters.items() if a.input_router is not None)
    if routed:
        raise CheckpointError(
            f"{found} chooses experts by the input, as in {routed[0]}: no factors of a task do",
            expected="for a pack, a checkpoint whose routes depend on the task alone",
            fix=fix,
        )
    if contents.prompts is not None:
        raise CheckpointError(
            f"{found} puts prompts before the text, which the tasks of a pack cannot",
            expected="for a pack, a checkpoint that adapts linears and heads alone",
            fix=fix,
        )
    if contents.weights:
        raise CheckpointError(
            f"{found} replaces parameters of the base that the tasks of a pack share, such as "
            f"{min(contents.weights)}",
            expected="for a pack, a checkpoint that adapts linears and heads alone",
            fix=fix,
        )


def factor(
    source: Checkpoint, task_id: int, gate: PackGate | None, progress: Progress
) -> Factored:
    """Factor a task; with a reference, every linear is compared after each pass.

    Raises:
        ParityError: a linear is not the reference's.
    """
    model, layers = source.model, dict[str, float]()
    linears = None if gate is None else gate.linears(source.contents.tasks[task_id].name)
    if linears is not None:
        stage = f"the {source.contents.format} reader"
        layers[stage] = linears.check(model, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        if linears is not None:
            layers[f"the pass {record.name}"] = linears.check(model, f"the pass {record.name}")
        progress(record)

    model, records = run_adapter_passes(
        model, factoring_passes(task_id), task_id=task_id,
        probe=None if linears is None else linears.probe, after=after,
    )  # fmt: skip
    return Factored(task_id, model, tuple(records), layers)


def task_tensors(factored: Factored, heads: Collection[str]) -> dict[str, Array]:
    """Return what the graphs are fed for a task, by the names of their inputs, float32.

    A linear of a head is there as a whole, what is adapted of it folded in.

    Args:
        factored: the task.
        heads: the parameters that are inputs.
    """
    model, tensors = factored.model, dict[str, Array]()
    for path, delta in low_ranks(model).items():
        if delta is not None and f"{path}.weight" not in heads:
            pair = delta.A.numpy().T, delta.B.numpy().T
            for name, array in zip(factor_names(path), pair, strict=True):
                tensors[name] = np.ascontiguousarray(array)
    for name in heads:
        tensor, adapter = model.weights[name], model.adapters.get(name.removesuffix(".weight"))
        if adapter is not None and adapter.parameter == name and adapter.branches:
            tensor = folded(tensor, adapter, "float32")
        tensors[name] = np.ascontiguousarray(as_dtype(tensor, "float32").numpy())
    return tensors


def adapter_file(name: str, taken: Iterable[str]) -> str:
    """Return what the file of a task is called: its name, where a file can have it.

    Args:
        name: the task's name in the pack.
        taken: files that are there; some file systems do not tell upper case from lower.
    """
    file, others = f"{name}{ADAPTER}", {other.lower() for other in taken}
    try:
        if len(name) <= _LONGEST and file_name(file, "a task").lower() not in others:
            return file
    except BundleError:
        pass
    return f"task-{hashlib.sha256(name.encode()).hexdigest()[:16]}{ADAPTER}"


def write_adapter(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors in ONNX Runtime's adapter format; equal tensors give equal bytes."""
    import onnxruntime

    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
        for name, array in sorted(tensors.items())
    }
    content.set_parameters(values)
    with bundle.written_by("ONNX Runtime", path, RuntimeError):
        content.export_adapter(str(path))


def describe_task(
    source: Checkpoint,
    factored: Factored,
    tensors: Mapping[str, Array],
    path: Path,
    graphs: Mapping[str, onnx_ir.Model],
    tokenizer: text.TrainingTokenizer | None,
    *,
    optimize_for: str,
) -> tuple[PackTask, Manifest]:
    """Return what a pack's manifest says of a task nobody has compared, and its engine's.

    Args:
        source: the checkpoint.
        factored: the task.
        tensors: its tensors.
        path: the file they are in.
        graphs: the pack's.
        tokenizer: the tokenizer of training.
        optimize_for: the execution provider the graphs are fused for.
    """
    config = task_config(source, factored.task_id)
    engine = describe(
        source, [factored.task_id], {**config.to_dict(), **factored.model.config},
        text.generation_config(source.base.path), graphs, tokenizer, factored.records,
        precision="fp32", optimize_for=optimize_for,
        plugins=[] if source.format.plugin is None else [source.format.plugin],
    )  # fmt: skip
    assert engine.task is not None
    sizes = collections.Counter(
        tensors[a].shape[1] for a in (factor_names(p)[0] for p in factored.linears) if a in tensors
    )
    task = PackTask(
        file=path.name,
        record=FileRecord(sha256(path), path.stat().st_size),
        task=engine.task,
        num_labels=engine.num_labels,
        generation=engine.generation,
        tokenizer=engine.tokenizer,
        routing=engine.routing,
        checkpoint=engine.checkpoint,
        ranks={str(rank): count for rank, count in sorted(sizes.items())},
        passes=engine.passes,
        tools=engine.tools,
        parity=engine.parity,
    )
    return task, engine
