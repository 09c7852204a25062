"""`--layout pack`: tasks of a checkpoint over one base, in one flat folder.

::

    pack.json               what everything is; weights.bin and graphs have their hashes here
    weights.bin             the base's weights, once
    model.onnx              the base, with every task's factors and head as optional inputs
    folded.model.onnx       the same without branches, for sessions with a task's weights in it
    <task>.onnx_adapter     a task's factors and head: all that it adds
    config.json, tokenizer.json, ...
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from eptc import bundle, lower, text
from eptc.checkpoint import Checkpoint
from eptc.describe import OPSET, tool_versions, write_texts
from eptc.errors import OptionError
from eptc.fitting import task_config
from eptc.interop.base import Folder, FolderJob, FolderTarget
from eptc.job import Progress, Written
from eptc.machine import available_memory
from eptc.options import Options
from eptc.packs.graphs import FOLDED, PackGraphs, head_sizes
from eptc.packs.task import (
    Factored,
    adapter_file,
    check_factors,
    describe_task,
    factor,
    task_tensors,
    write_adapter,
)
from eptc.planning import WRITERS
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.pack import Pack
from eptc.runtime.pack_manifest import PackManifest
from eptc.runtime.pack_spec import PackTask
from eptc.runtime.providers import CPU
from eptc.runtime.seal import sealed
from eptc.runtime.spec import PACK

if TYPE_CHECKING:
    from eptc.parity_gate.packs import PackGate

__all__ = ["TaskPack", "pack_gate", "proven"]


class TaskPack(FolderTarget):
    """Many tasks over one base: one file of weights, and one small file for each task."""

    name: ClassVar[str] = "onnx"
    takes: ClassVar[frozenset[str]] = frozenset({"layout", "optimize_for"})

    @property
    def asked(self) -> str:
        """How it is asked for, for messages."""
        return "--layout pack, whose engines are in float32 and take no such option"

    def check(self, options: Options) -> None:
        """Raise OptionError for what no pack can be."""
        if options.target != "onnx":
            raise OptionError(
                f"--layout pack was given together with --target {options.target}",
                expected="it with --target onnx",
            )
        if options.provider == "cuda":
            raise OptionError(
                "--layout pack was given together with --optimize-for cuda, which packs "
                "projections into one weight that no factors stand beside",
                expected="--optimize-for cpu or any; sessions on CUDA run either",
            )

    def write(self, job: FolderJob, directory: Path) -> Folder:
        """Write and prove a pack of the tasks."""
        source, clock = job.source, job.clock
        check_factors(source)
        gate = None
        if job.options.verify:
            with clock.stage("load the reference"):
                gate = pack_gate(source, job.options.max_memory)
        with clock.stage("hash and check the base model"):
            source.check_base()
        with clock.stage("factor"):
            tasks = [factor(source, task_id, gate, job.progress) for task_id in job.task_ids]
        heads = head_sizes(source, job.task_ids)
        linears = {
            path: sizes
            for task in tasks
            for path, sizes in task.linears.items()
            if f"{path}.weight" not in heads
        }
        with clock.stage("trace and rewrite"):
            config = task_config(source, job.task_ids[0])
            graphs = PackGraphs.make(source, config, linears, heads, job.options.provider)
            for record in graphs.records:
                job.progress(record)
        with clock.stage("write"):
            manifest = _write(job, directory, tasks, graphs)
        if gate is not None:
            for name, task in zip(manifest.tasks, tasks, strict=True):
                with clock.stage("parity"):
                    manifest = proven(gate, directory, manifest, name, task, job.progress)
        bundle.write_json(directory / PACK, sealed(manifest.to_json()))
        records = (*(record for task in tasks for record in task.records), *graphs.records)
        return Folder(
            directory, self.name, tuple(manifest.tasks), records, (), {},
            {name: dict(entry.parity) for name, entry in manifest.tasks.items()},
            {name: entry.told() for name, entry in manifest.tasks.items()},
        )  # fmt: skip


def _write(
    job: FolderJob, directory: Path, tasks: list[Factored], graphs: PackGraphs
) -> PackManifest:
    """Write everything but the manifest; return it, its tasks compared with nothing."""
    source, provider = job.source, job.options.provider
    written = lower.WeightsFile.write(
        graphs.models, directory, threads=WRITERS,
        outside=frozenset(f"{path}.weight" for path in graphs.linears),
        progress=lambda done, total: job.progress(Written(done, total)),
    )  # fmt: skip
    for name, model in graphs.models.items():
        written.write_graph(model, directory / f"{name}.onnx")
    tokenizer = text.find_tokenizer(source.path, source.base.path)
    generation = text.generation_config(source.base.path)
    write_texts(directory, source, source.model, generation, tokenizer)
    shared = bundle.file_records(directory, {lower.WEIGHTS: written.sha256})
    entries: dict[str, PackTask] = {}
    for task in tasks:
        name = source.contents.tasks[task.task_id].name
        taken = [*shared, *(entry.file for entry in entries.values())]
        path, tensors = directory / adapter_file(name, taken), task_tensors(task, graphs.heads)
        write_adapter(path, tensors)
        entries[name], engine = describe_task(
            source, task, tensors, path, graphs.switched, tokenizer, optimize_for=provider
        )
    return PackManifest(
        kind=engine.kind,
        opset=OPSET,
        optimized_for=provider,
        vocab_size=engine.vocab_size,
        graphs=engine.graphs,
        folded={role: f"{FOLDED}{role}.onnx" for role in graphs.switched},
        weights=lower.WEIGHTS,
        linears=graphs.linear_specs(source, written),
        heads=graphs.head_specs(),
        base=engine.base,
        passes=tuple(record.to_json() for record in graphs.records),
        tools=tool_versions(("onnx", "onnx-ir", "onnxscript")),
        files=shared,
        tasks=entries,
    )


def pack_gate(source: Checkpoint, max_memory: int | None) -> PackGate:
    """Return what compares tasks with the reference, which is loaded.

    Raises:
        OptionError: there is no memory for it.
    """
    from eptc.parity_gate.memory import engine_bytes, whole_model_bytes
    from eptc.parity_gate.packs import PackGate

    limit = available_memory() if max_memory is None else max_memory
    # The reference, and both engines of a task.
    needed = whole_model_bytes(source) + engine_bytes(source)
    if limit is not None and needed > limit:
        raise OptionError(
            "tasks of a pack are compared with the whole model in memory, which takes "
            f"{needed / 1e9:.1f} GB, and {limit / 1e9:.1f} GB may be used",
            fix="build where there is more memory, give --no-verify and compare later with "
            "`eptc parity`, or export each task by itself",
        )
    return PackGate(source)


def proven(
    gate: PackGate,
    directory: Path,
    manifest: PackManifest,
    name: str,
    task: Factored,
    progress: Progress,
) -> PackManifest:
    """Compare a task as it will be served; return the manifest that says so.

    Args:
        gate: the reference.
        directory: the pack's folder.
        manifest: what it will say; it need not be there yet.
        name: the task's name in it.
        task: the task.
        progress: called with what is being done.

    Raises:
        ParityError: the task does not give the reference's answers.
    """
    from eptc.parity_gate.packs import pack_summary

    pack = Pack(directory, manifest, [(CPU, {})], usable_cpus())
    reports = gate.prove(pack, name, layers=task.layers, progress=progress)
    entry = dataclasses.replace(manifest.tasks[name], parity=pack_summary(reports))
    return dataclasses.replace(manifest, tasks={**manifest.tasks, name: entry})
