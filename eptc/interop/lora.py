"""`--target lora`: tasks of a checkpoint as stock PEFT adapters, proven beside the reference."""

from __future__ import annotations

import collections
import dataclasses
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from eptc import bundle
from eptc.errors import BundleError, CheckpointError, OptionError, TaskError
from eptc.interop.base import Folder, FolderJob, FolderTarget, write_provenance
from eptc.interop.lora_files import low_ranks, write_adapter
from eptc.ir import AdaptedModel, Float64, singular_values
from eptc.options import Options
from eptc.pipeline import factoring_passes
from eptc.run_passes import PassRecord, run_adapter_passes
from eptc.runtime.spec import file_name
from eptc.tensors import unit_roundoff

if TYPE_CHECKING:
    from eptc.checkpoint import Checkpoint
    from eptc.parity_gate.adapters import AdapterGate

__all__ = ["Lora", "serving_notes"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Characters of a folder's name: file systems take some more.
_LONGEST = 200
# What vLLM's --max-lora-rank may be, and is where nobody says.
_VLLM_RANKS, _VLLM_DEFAULT = (8, 16, 32, 64, 128, 256, 320, 512), 16


class Lora(FolderTarget):
    """A stock PEFT LoRA adapter for each task.

    For a fixed task an EPT adds a low rank to each linear, so the adapter is exact up to one
    rounding of its factors. One task is written into the folder itself, several into a folder
    for each, called after it: spaces and signs in its name are percent-encoded.
    """

    name: ClassVar[str] = "lora"
    takes: ClassVar[frozenset[str]] = frozenset({"max_rank"})

    def check(self, options: Options) -> None:
        """Raise OptionError for a rank that no adapter has."""
        if options.max_rank is not None and options.max_rank < 1:
            raise OptionError(f"--max-rank is {options.max_rank}", expected="1 or more")

    def write(self, job: FolderJob, directory: Path) -> Folder:
        """Write and prove the adapter of each task."""
        _refuse_what_is_more(job.source)
        folders = _folders(job, directory)
        with job.clock.stage("hash and check the base model"):
            job.source.check_base()
        gate = _gate(job)
        written = [_write_one(job, task_id, path, gate) for task_id, path in folders.items()]
        if job.several:
            names = sorted(folder.name for folder in folders.values())
            bundle.write_json(
                directory / bundle.PROVENANCE,
                {"schema": 1, "target": self.name, "folders": names},
            )
        return Folder(
            directory, self.name, tuple(task.name for task in job.tasks),
            tuple(record for each in written for record in each.passes),
            tuple(dict.fromkeys(note for each in written for note in each.notes)),
            {}, {each.task: each.parity for each in written},
            {each.task: each.figures for each in written},
        )  # fmt: skip


def _gate(job: FolderJob) -> AdapterGate | None:
    if not job.options.verify:
        return None
    from eptc.parity_gate.adapters import AdapterGate

    with job.clock.stage("load the reference"):
        return AdapterGate(job.source, job.options.max_memory)


def _refuse_what_is_more(source: Checkpoint) -> None:
    """Raise CheckpointError for what no low rank beside a linear can say."""
    contents = source.contents
    found = f"{source.path} ({contents.format}, {contents.variant})"
    routed = sorted(path for path, a in contents.adapters.items() if a.input_router is not None)
    if routed:
        raise CheckpointError(
            f"{found} chooses experts by the input, as in {routed[0]}: no LoRA does",
            expected="a checkpoint whose routes depend on the task alone",
            fix="export it with --target onnx, with --routing frozen where an average will do",
        )
    if contents.prompts is not None:
        raise CheckpointError(
            f"{found} puts prompts before the text: a LoRA has none",
            expected="a checkpoint that adapts linears alone",
            fix="export it with --target onnx",
        )
    if contents.weights:
        raise CheckpointError(
            f"{found} replaces parameters of the base beside its low ranks, such as "
            f"{sorted(contents.weights)[0]}, which programs that serve LoRAs do not take",
            expected="a checkpoint that adapts linears and heads alone",
            fix="export it with --target onnx",
        )
    if not contents.adapters:
        raise CheckpointError(f"{found} adapts no linear", expected="at least one")


def _folders(job: FolderJob, directory: Path) -> dict[int, Path]:
    """Return the folder of each task, made."""
    if not job.several:
        return {job.task_ids[0]: directory}
    taken: dict[str, str] = {}
    folders = {}
    for task_id, task in zip(job.task_ids, job.tasks, strict=True):
        # As the records of builds are called: spaces and signs percent-encoded.
        name = urllib.parse.quote(task.name, safe="")
        # Some file systems do not tell upper case from lower.
        lower = name.lower()
        other = taken.setdefault(lower, task.name)
        if not _names_a_folder(name) or other != task.name or lower == bundle.PROVENANCE:
            raise TaskError(
                f"no folder beside the others can be called {task.name!r}"
                + (f": there is {other!r}" if other != task.name else ""),
                fix="export this task by itself, into a folder of your choice",
            )
        folders[task_id] = directory / name
        folders[task_id].mkdir()
    return folders


def _names_a_folder(quoted: str) -> bool:
    try:
        return len(quoted) <= _LONGEST and bool(file_name(quoted.replace("%", "_"), "a task"))
    except BundleError:
        return False


@dataclasses.dataclass(frozen=True)
class _Written:
    """One adapter: its task's name, what the passes did, what was compared, what it is like."""

    task: str
    passes: tuple[PassRecord, ...]
    notes: tuple[str, ...]
    parity: Mapping[str, Any]
    figures: Mapping[str, Any]


def _write_one(job: FolderJob, task_id: int, folder: Path, gate: AdapterGate | None) -> _Written:
    """Factor, write and prove the adapter of one task."""
    source, max_rank = job.source, job.options.max_rank
    task, kind = source.contents.tasks[task_id], source.base.architecture.kind
    job.progress(f"task {task.name}")
    layers: dict[str, float] = {}
    with job.clock.stage("factor"):
        exact, model, records = _factor(job, task_id, gate, layers)
    with job.clock.stage("write"):
        own = source.contents.heads.get(task.name, {})
        name = _hub_name(source.format.base_name(source.path))
        rank = write_adapter(folder, model, exact, own, kind, name)
        figures = _figures(exact, model, rank, max_rank)
    parity: dict[str, Any] = {"verified": False}
    if gate is not None:
        with job.clock.stage("parity"):
            parity = gate.prove(
                folder, task.name, cut=None if max_rank is None else _least(exact, max_rank),
                layers=layers, progress=job.progress,
            )  # fmt: skip
    write_provenance(
        folder, job, [task_id], target=Lora.name, passes=records, parity=parity,
        tools=("safetensors",), adapter=figures,
    )  # fmt: skip
    heads = kind == "encoder-classifier"
    notes = serving_notes(rank, heads=heads) if kind != "encoder-decoder" else ()
    return _Written(task.name, tuple(records), notes, parity, figures)


def _hub_name(name: str | None) -> str | None:
    """Return a base's name where it is a hub's; None for a place on somebody's disk."""
    return name if name is not None and _HUB_NAME.fullmatch(name) else None


def _factor(
    job: FolderJob, task_id: int, gate: AdapterGate | None, layers: dict[str, float]
) -> tuple[AdaptedModel, AdaptedModel, list[PassRecord]]:
    """Return the model before ranks are cut and after, and what each pass did.

    Args:
        job: what is asked for.
        task_id: the task.
        gate: compares every linear with the reference's after each exact pass.
        layers: gets the largest deviation by stage, as a fraction of its bound.
    """
    source = job.source
    linears = None if gate is None else gate.linears(source.contents.tasks[task_id].name)
    exact = source.model
    if linears is not None:
        stage = f"the {source.contents.format} reader"
        layers[stage] = linears.check(exact, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        nonlocal exact
        if record.contract == "exact":
            exact = model
            if linears is not None:
                layers[f"the pass {record.name}"] = linears.check(model, f"the pass {record.name}")
        job.progress(record)

    model, records = run_adapter_passes(
        source.model, factoring_passes(task_id, job.options.max_rank), task_id=task_id,
        probe=None if linears is None else linears.probe, after=after,
    )  # fmt: skip
    return exact, model, records


def _size(u: Float64, v: Float64) -> float:
    """Return the Frobenius norm of u v."""
    return float(np.linalg.norm(singular_values(u, v)))


def _least(exact: AdaptedModel, max_rank: int) -> dict[str, float]:
    """Return what the nearest matrix of a rank loses of each linear, a share of its size."""
    least = {}
    for path, delta in low_ranks(exact).items():
        values = singular_values(*delta.factors()) if delta is not None else np.zeros(1)
        whole = float(np.linalg.norm(values))
        least[path] = float(np.linalg.norm(values[max_rank:])) / whole if whole else 0.0
    return least


def _figures(
    exact: AdaptedModel, written: AdaptedModel, rank: int, max_rank: int | None
) -> dict[str, Any]:
    """Return what an adapter is like: JSON values.

    `rounding` bounds what one rounding of both factors moves of what a linear's branches add, as
    a share of it by the Frobenius norm: the largest of all linears. `lost` is the share that a
    cut of the rank left out.
    """
    whole, cut = low_ranks(exact), low_ranks(written)
    factors = {path: delta.factors() for path, delta in whole.items() if delta is not None}
    roundoff = 2 * unit_roundoff("float32")
    moved = [roundoff * _size(np.abs(u), np.abs(v)) / _size(u, v) for u, v in factors.values()]
    figures: dict[str, Any] = {
        "rank": rank,
        "linears": len(whole),
        "ranks": {
            str(size): count
            for size, count in sorted(
                collections.Counter(0 if d is None else d.A.shape[0] for d in cut.values()).items()
            )
        },
        "rounding": _digits(max(moved, default=0.0)),
        "lost": None,
    }
    if max_rank is not None:
        lost = dict.fromkeys(whole, 0.0)
        for path, (u, v) in factors.items():
            delta = cut[path]
            if delta is not None and delta is not whole[path]:
                b, a = delta.factors()
                lost[path] = _size(np.hstack([u, -b]), np.vstack([v, a])) / _size(u, v)
        worst = max(lost, key=lambda path: lost[path])
        figures["lost"] = {
            "max_rank": max_rank, "worst": _digits(lost[worst]), "worst_linear": worst,
            "mean": _digits(sum(lost.values()) / len(lost)),
        }  # fmt: skip
    return figures


def serving_notes(rank: int, *, heads: bool) -> tuple[str, ...]:
    """Return what programs that serve adapters make of one.

    Args:
        rank: of the adapter.
        heads: whether it has a classification head of its own.
    """
    if heads:
        return (
            "the adapters hold classification heads (modules_to_save): PEFT takes them, vLLM and "
            "TensorRT-LLM do not",
        )
    if rank <= _VLLM_DEFAULT:
        return ()
    fits = next((size for size in _VLLM_RANKS if size >= rank), None)
    if fits is None:
        return (
            f"rank {rank}: vLLM takes {_VLLM_RANKS[-1]} at most; cut it with --max-rank, which is "
            "lossy",
        )
    return (
        f"rank {rank}: vLLM takes {_VLLM_DEFAULT} unless it is started with --max-lora-rank "
        f"{fits} (of {', '.join(map(str, _VLLM_RANKS))})",
    )


def _digits(value: float) -> float:
    """Round to two digits: the others depend on the processor."""
    return float(f"{value:.1e}")
