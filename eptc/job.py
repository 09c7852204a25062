"""A build: what it was asked for, what it reads, how it reports on itself."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from eptc import checkpoint, lower
from eptc.describe import OPSET
from eptc.errors import OptionError, TaskError
from eptc.fitting import check_fit, task_config
from eptc.ir import AdaptedModel
from eptc.options import Options
from eptc.pass_base import AdapterPass, GraphPass
from eptc.pipeline import PassRecord, adapter_passes, graph_passes
from eptc.planning import Plan, make_plan
from eptc.plugins import Plugin
from eptc.precision import SCHEMES, Scheme
from eptc.precision_plan import PrecisionPlan
from eptc.skeletons import Skeleton, skeleton
from eptc.tasks import Task, TaskChoice, names_several, resolve
from eptc.text import has_tokenizer

__all__ = ["Clock", "Event", "Job", "Progress", "Written"]


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


@dataclasses.dataclass(frozen=True)
class Job:
    """A build whose inputs were read and go together; no weight was."""

    options: Options
    source: checkpoint.Checkpoint
    task_id: int
    config: Any
    plan: Plan
    precision_plan: PrecisionPlan | None

    @classmethod
    def read(cls, ckpt: str | Path, options: Options) -> Job:
        """Read what a build needs to know; raise InputError where something does not fit."""
        options.check()
        given = options.precision_plan
        precision_plan = None if given is None else PrecisionPlan.read(Path(given))
        source = checkpoint.read(
            Path(ckpt),
            Path(options.base) if options.base is not None else None,
            top_k=options.top_k,
            tasks=options.tasks,
            task_spec=Path(options.task_spec) if options.task_spec is not None else None,
            allow_pickle=options.allow_pickle,
            format=options.format,
            routing=options.routing,
        )
        task_id = resolve(_named(options.task, source), source.contents.tasks)
        options.check_task(source.contents.tasks[task_id])
        _check_tokenizer(options, source)
        config = task_config(source, task_id)
        check_fit(source, task_id, config)
        plan = make_plan(
            source, config, precision=options.precision, verify=options.verify,
            max_memory=options.max_memory, runs_exact=options.runs_exact,
        )  # fmt: skip
        return cls(options, source, task_id, config, plan, precision_plan)

    @property
    def named_task(self) -> str | int:
        """The task as the caller named it."""
        return _named(self.options.task, self.source)

    @property
    def task(self) -> Task:
        """The task that is compiled."""
        return self.source.contents.tasks[self.task_id]

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
        return "float64" if self.scheme.integers else "float32"

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
        lower.bind(graphs, model.weights)
        for graph in graphs.values():
            lower.insert_branches(graph, model.adapters, model.weights, self.dtype)
        return graphs

    def graph_passes(self) -> list[GraphPass]:
        """Return the passes over the graphs."""
        added = [a.step for a in self.options.added if isinstance(a.step, GraphPass)]
        return graph_passes(self.options.provider, self.options.precision, added)

    def adapter_passes(self) -> list[AdapterPass]:
        """Return the passes over the adapters."""
        added = [a.step for a in self.options.added if isinstance(a.step, AdapterPass)]
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


def _named(task: TaskChoice, source: checkpoint.Checkpoint) -> str | int:
    """Return the task that is meant: the only one, where none is named."""
    tasks = source.contents.tasks
    if task is None and len(tasks) > 1:
        raise TaskError(
            f"{source.path} has {len(tasks)} tasks, and none was chosen",
            expected=", ".join(found.name for found in tasks),
            fix="choose one with --task",
        )
    if names_several(task):
        raise TaskError(
            f"several tasks were chosen: {task!r}",
            expected=", ".join(found.name for found in tasks),
            fix="choose one with --task",
        )
    assert not isinstance(task, Sequence) or isinstance(task, str)
    return 0 if task is None else task


def _check_tokenizer(options: Options, source: checkpoint.Checkpoint) -> None:
    """Refuse to freeze routers whose gates no text can show.

    Raises:
        OptionError: neither the checkpoint nor its base has a tokenizer.
    """
    if options.routing == "frozen" and not has_tokenizer(source.path, source.base.path):
        raise OptionError(
            "--routing frozen replaces gates by what they are on text, and neither "
            f"{source.path} nor its base {source.base.path} has a tokenizer",
            expected="the files of the tokenizer it was trained with, such as tokenizer.json",
            fix="put them beside the base model, or leave --routing out",
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
