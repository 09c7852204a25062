"""`--target lora`: tasks of a checkpoint as stock PEFT adapters, proven beside the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eptc import bundle, checkpoint
from eptc.adapter_folder import adapter_rank, write_adapter
from eptc.errors import CheckpointError, OptionError, ParityError
from eptc.fitting import check_fit, task_config
from eptc.ir import AdaptedModel
from eptc.pass_base import AdapterPass
from eptc.passes.drop_dead_experts import DropDeadExperts
from eptc.passes.factor_pyramid import FactorPyramid
from eptc.passes.specialize_router import SpecializeRouter
from eptc.passes.truncate_rank import TruncateRank
from eptc.pipeline import PassRecord, run_adapter_passes
from eptc.tasks import resolve
from eptc.tensors import unit_roundoff

__all__ = ["ExportedAdapter", "export_adapters"]

ALL = "all"


@dataclasses.dataclass(frozen=True)
class ExportedAdapter:
    """One task as a PEFT adapter.

    Args:
        task: its name.
        path: its folder.
        rank: the largest rank of a linear.
        rounding: how far one rounding of both factors may move an element of what the branches
            of a linear add, as a fraction of the largest such element: the largest of all linears.
        lost: share of what a linear's branches add, by the Frobenius norm, that `max_rank` cut
            off: the largest of all linears.
        largest_error: of the adapter's outputs beside the reference's, as a fraction of their
            bound; None where nobody compared them.
        flips: labels or tokens that differ from the reference's on the probes.
        passes: what each pass did.
    """

    task: str
    path: Path
    rank: int
    rounding: float
    lost: float
    largest_error: float | None
    flips: int
    passes: tuple[PassRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **dataclasses.asdict(self), "path": str(self.path),
            "passes": [record.to_json() for record in self.passes],
        }  # fmt: skip


def export_adapters(
    ckpt: str | Path,
    *,
    out: str | Path,
    task: str | int | Sequence[str] | None = None,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    max_rank: int | None = None,
    verify: bool = True,
    allow_pickle: bool = False,
    format: str | None = None,
    force: bool = False,
    progress: Callable[[Any], None] = lambda _: None,
) -> list[ExportedAdapter]:
    """Write tasks of a checkpoint as stock PEFT LoRA adapters.

    For a fixed task an EPT is a low rank beside each linear, so the adapter is exact up to one
    rounding of its factors. Its outputs on seeded tokens are compared with the unfolded model's.

    Args:
        ckpt: folder of the checkpoint.
        out: new or empty folder: the adapter's, or, for several tasks, that of a folder for each.
        task: name, alias or id; several names; `all`; None where the checkpoint has one.
        base: folder of the base model.
        tasks: task names in id order, where the checkpoint does not store them.
        top_k: experts a task uses, where the checkpoint does not store it.
        task_spec: JSON file with prompts and labels.
        max_rank: ranks above it are truncated, which is lossy; None: exact.
        verify: False publishes adapters nobody compared with anything.
        allow_pickle: read `.bin` files (weights only).
        format: of the checkpoint; None: what its folder looks like.
        force: replace what lies at `out`.
        progress: called with what is being done.

    Raises:
        InputError: something about the input, or routes that depend on it: no low rank equals
            those.
        ParityError: an adapter does not give the reference's answers; nothing was published.
    """
    if max_rank is not None and max_rank < 1:
        raise OptionError(f"--max-rank is {max_rank}", expected="1 or more")
    out = Path(out)
    bundle.check_place(
        out, force=force, inputs={"the checkpoint": ckpt, "the base model": base,
                                  "the task description": task_spec},
    )  # fmt: skip
    source = checkpoint.read(
        Path(ckpt), None if base is None else Path(base), top_k=top_k, tasks=tasks,
        task_spec=None if task_spec is None else Path(task_spec), allow_pickle=allow_pickle,
        format=format,
    )  # fmt: skip
    _refuse_more(source)
    chosen = _chosen(source, task)
    for task_id in chosen:
        check_fit(source, task_id, task_config(source, task_id))
    source.check_base()
    with bundle.draft(out, force=force) as draft:
        written = []
        for task_id in chosen:
            name = source.contents.tasks[task_id].name
            progress(f"task {name}")
            folder = draft.path if len(chosen) == 1 else draft.path / name
            folder.mkdir(exist_ok=True)
            written.append(_one(source, task_id, folder, max_rank))
        if verify:
            from eptc.parity_gate.adapters import prove_adapters

            progress("parity")
            outcomes = prove_adapters(
                source, {a.task: a.path for a in written}, lossy=max_rank is not None
            )
            written = [
                dataclasses.replace(a, largest_error=outcomes[a.task][0], flips=outcomes[a.task][1])
                for a in written
            ]
        draft.publish()
    return [
        dataclasses.replace(a, path=draft.out / a.path.relative_to(draft.path)) for a in written
    ]
