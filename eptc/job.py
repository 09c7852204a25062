"""A build: what it was asked for, what it reads, how it reports on itself."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir

from eptc import checkpoint, lower
from eptc.describe import OPSET
from eptc.errors import OptionError
from eptc.fitting import check_fit, stacked_model, task_config
from eptc.ir import AdaptedModel
from eptc.options import Options
from eptc.pass_base import AdapterPass, GraphPass
from eptc.pipeline import adapter_passes, graph_passes, stacking_passes
from eptc.planning import Plan, make_plan
from eptc.plugins import Plugin
from eptc.precision import SCHEMES, Scheme
from eptc.precision_plan import PrecisionPlan
from eptc.run_passes import PassRecord
from eptc.skeletons import Skeleton, skeleton
from eptc.stacking import check_stackable, refused_blocks, stack_bytes, stacked_heads
from eptc.tasks import Task, chosen, names_several
from eptc.text import has_tokenizer

__all__ = ["Clock", "Event", "Job", "Progress", "Written", "read_source"]


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


def read_source(ckpt: str | Path, options: Options) -> checkpoint.Checkpoint:
    """Read a checkpoint and its base as the options say; raises InputError."""
    return checkpoint.read(
        Path(ckpt),
        Path(options.base) if options.base is not None else None,
        top_k=options.top_k,
        tasks=options.tasks,
        task_spec=Path(options.task_spec) if options.task_spec is not None else None,
        allow_pickle=options.allow_pickle,
        format=options.format,
        routing=options.routing,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """A build whose inputs were read and go together; no weight was."""

    options: Options
    source: checkpoint.Checkpoint
    task_ids: tuple[int, ...]
    config: Any
    plan: Plan
    precision_plan: PrecisionPlan | None

    @classmethod
    def read(cls, ckpt: str | Path, options: Options) -> Job:
        """Read what a build needs to know; raise InputError where something does not fit."""
        options.check()
        given = options.precision_plan
        precision_plan = None if given is None else PrecisionPlan.read(Path(given))
        source = read_source(ckpt, options)
        task_ids = tuple(chosen(options.task, source.contents.tasks))
        for task_id in task_ids:
            options.check_task(source.contents.tasks[task_id])
            check_fit(source, task_id, task_config(source, task_id))
        _check_tokenizer(options, source)
        if names_several(options.task):
            check_stackable(source, options.task, task_ids)
        config = task_config(source, *task_ids)
        plan = make_plan(
            source, config, precision=options.precision, verify=options.verify,
            max_memory=options.max_memory, runs_exact=options.runs_exact,
            beside=stack_bytes(source, task_ids), wide_tables=options.explicit_quantization,
        )  # fmt: skip
        if len(task_ids) > 1 and plan.verification == "block by block":
            raise refused_blocks(source, plan.stored)
        return cls(options, source, task_ids, config, plan, precision_plan)

    @property
    def several(self) -> bool:
        """Whether one engine serves several tasks."""
        return len(self.task_ids) > 1

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that are compiled."""
        return tuple(self.source.contents.tasks[task_id] for task_id in self.task_ids)

    @property
    def task_id(self) -> int:
        """The id of the task that is compiled, where there is one."""
        (task_id,) = self.task_ids
        return task_id

    @property
    def task(self) -> Task:
        """The task that is compiled, where there is one."""
        return self.source.contents.tasks[self.task_id]

    @property
    def model(self) -> AdaptedModel:
        """The model that the passes start from."""
        return stacked_model(self.source, self.task_ids) if self.several else self.source.model

    @property
    def scheme(self) -> Scheme:
        """What the precision asked for means."""
        return SCHEMES[self.options.precision]

    @property
    def dtype(self) -> str | None:
        """Type that folded weights are rounded to; None for each base weight's own.

        What becomes integers is not rounded before: each pass rounds float64 once.
        """
        if self.options.precision == "keep":
            return None
        return "float64" if self.scheme.quantized else "float32"

    @property
    def needs_exact(self) -> bool:
        """Whether the float32 engine is written first: to be proven, or to be run on text."""
        whole = self.plan.verification == "whole model"
        return self.scheme.lossy and (whole or self.options.runs_exact)

    def skeleton(self) -> Skeleton:
        """Return the task model without numbers, traced where no build has done so before."""
        source = self.source
        return skeleton(
            self.config, opset=OPSET, tied_head=source.base.tied_head,
            prompts=source.contents.prompts,
        )  # fmt: skip

    def bound(self, model: AdaptedModel) -> dict[str, onnx_ir.Model]:
        """Return the graphs with a model's weights, none of them read."""
        graphs = self.skeleton().copy_graphs()
        if not self.several:
            lower.bind(graphs, model.weights)
            for graph in graphs.values():
                lower.insert_branches(graph, model.adapters, model.weights, self.dtype)
            return graphs
        heads = stacked_heads(model, self.tasks)
        widest = max(range(len(heads)), key=lambda place: self.tasks[place].num_outputs)
        lower.bind(graphs, {**model.weights, **heads[widest]})
        for graph in graphs.values():
            lower.insert_tasks(graph, model.adapters, heads, self.task_ids)
        return graphs

    def graph_passes(self) -> list[GraphPass]:
        """Return the passes over the graphs."""
        added = [a.step for a in self.options.added if isinstance(a.step, GraphPass)]
        own = self.options.aim.target.graph_passes
        return graph_passes(self.options.provider, self.options.precision, [*own, *added])

    def adapter_passes(self) -> list[AdapterPass]:
        """Return the passes over the adapters."""
        added = [a.step for a in self.options.added if isinstance(a.step, AdapterPass)]
        if self.several:
            return stacking_passes(self.task_ids, added)
        return adapter_passes(self.task_id, self.dtype, added)

    @property
    def origins(self) -> dict[str, str]:
        """Where passes come from that are not eptc's own, by name."""
        return {added.step.name: added.origin for added in self.options.added}

    @property
    def plugins(self) -> list[Plugin]:
        """What the build uses of other packages."""
        found = [self.source.format.plugin, self.options.aim.plugin]
        found += [added.plugin for added in self.options.added]
        return [plugin for plugin in found if plugin is not None]


def _check_tokenizer(options: Options, source: checkpoint.Checkpoint) -> None:
    """Refuse what has to be seen on text where no text can be read.

    Raises:
        OptionError: neither the checkpoint nor its base has a tokenizer.
    """
    if not options.calibrated or has_tokenizer(source.path, source.base.path):
        return
    why, instead = (
        ("--routing frozen replaces gates by what they are on text", "leave --routing out")
        if options.routing == "frozen"
        else (
            f"--precision {options.precision} follows from ranges that are seen on text",
            "choose a --precision that needs none, such as int8",
        )
    )
    raise OptionError(
        f"{why}, and neither {source.path} nor its base {source.base.path} has a tokenizer",
        expected="the files of the tokenizer it was trained with, such as tokenizer.json",
        fix=f"put them beside the base model, or {instead}",
    )


class Clock:
    """Wall time by stage; reports each stage as it starts."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the end of the block to a stage."""
        self._progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
