"""What a build is asked for, checked before anything is read."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from eptc.added_passes import AddedPass, added_passes
from eptc.checkpoint.contents import Routing
from eptc.errors import OptionError
from eptc.lower.blocks import Method
from eptc.pass_base import AdapterPass, GraphPass
from eptc.precision import SCHEMES, OptimizeFor, Precision, check_runs, check_target
from eptc.targets import Aim, find_target
from eptc.tasks import Task, TaskChoice, names_several

__all__ = ["IN_BLOCKS", "WITH_RANGES", "CalibrationMethod", "Layout", "Options"]

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
Layout = Literal["flat", "optimum", "pack"]
# What has weights in blocks, whose scales a method chooses.
IN_BLOCKS = ("int8-weights", "int4", "auto")
# What fixes the range of every activation that is multiplied.
WITH_RANGES = tuple(name for name, s in SCHEMES.items() if s.quantized and s.calibrated)

# Evaluations: fewer cannot find anything.
_FEWEST = 5


@dataclasses.dataclass(frozen=True)
class Options:
    """What a build is asked for; `export` describes each."""

    task: TaskChoice = None
    base: str | Path | None = None
    target: str = "onnx"
    tasks: Sequence[str] | None = None
    top_k: int | None = None
    task_spec: str | Path | None = None
    probe: str | Path | None = None
    precision: Precision = "fp32"
    precision_plan: str | Path | None = None
    calibration: str | Path | None = None
    calibration_method: CalibrationMethod = "minmax"
    block_method: Method = "rtn"
    data: str | Path | None = None
    max_drop: float | None = None
    max_flips: float | None = None
    search_evaluations: int | None = None
    search_minutes: float | None = None
    optimize_for: OptimizeFor | None = None
    max_memory: int | None = None
    verify: bool = True
    allow_pickle: bool = False
    format: str | None = None
    routing: Routing = "exact"
    passes: Sequence[str | AdapterPass | GraphPass] = ()
    max_rank: int | None = None
    layout: Layout = "flat"
    genai_python: str | Path | None = None
    profile: Sequence[str] = ()
    tensorrt_version: str | None = None
    build: bool = False

    @functools.cached_property
    def aim(self) -> Aim:
        """The target, found and told its options; raises OptionError or PluginError."""
        aim = find_target(self.target)
        if aim.plugin is not None:
            return aim
        return dataclasses.replace(aim, target=aim.target.told(self))

    @functools.cached_property
    def added(self) -> tuple[AddedPass, ...]:
        """The passes beside eptc's own, found; raises OptionError or PluginError."""
        return added_passes(self.passes)

    @property
    def provider(self) -> OptimizeFor:
        """The execution provider the graphs are fused for."""
        return self.optimize_for or self.aim.target.optimize_for or "cpu"

    @property
    def runs_exact(self) -> bool:
        """Whether the float32 engine is run on text before the precision is lowered."""
        return SCHEMES[self.precision].calibrated or self.data is not None

    @property
    def calibrated(self) -> bool:
        """Whether what is built depends on text that the float32 engine is run on."""
        return SCHEMES[self.precision].calibrated or self.routing == "frozen"

    @property
    def explicit_quantization(self) -> bool:
        """Whether products are 8 bits by QuantizeLinear and DequantizeLinear, and no tables."""
        return self.precision in WITH_RANGES and self.provider != "cpu"

    def inputs(self, ckpt: str | Path) -> dict[str, str | Path | None]:
        """Return every file and folder that is read, by what it is called in messages."""
        return {
            "the checkpoint": ckpt, "the base model": self.base, "the probes": self.probe,
            "the task description": self.task_spec, "the precision plan": self.precision_plan,
            "the calibration text": self.calibration, "the labelled data": self.data,
        }  # fmt: skip

    def check(self) -> None:
        """Raise OptionError for a value that no engine can have, or two that contradict."""
        for name, value, known in (
            ("precision", self.precision, get_args(Precision)),
            ("provider to optimize for", self.provider, get_args(OptimizeFor)),
            ("calibration method", self.calibration_method, get_args(CalibrationMethod)),
            ("block method", self.block_method, get_args(Method)),
            ("routing", self.routing, get_args(Routing)),
            ("layout", self.layout, get_args(Layout)),
        ):
            if value not in known:
                raise OptionError(f"the {name} is {value!r}", expected=" or ".join(known))
        fixed = self.aim.target.optimize_for
        self.check_tensorrt()
        if self.max_rank is not None:
            raise OptionError(
                f"--max-rank {self.max_rank} was given together with --target {self.target}, "
                "whose engines have no ranks",
                expected="it with --target lora",
            )
        if self.genai_python is not None:
            raise OptionError(
                f"--genai-python was given together with --target {self.target}, which is not "
                "run in onnxruntime-genai",
                expected="it with --target genai",
            )
        if self.layout == "pack":
            raise OptionError(
                "--layout pack was given where one engine is meant",
                expected="it without --dry-run and --precision all",
            )
        if self.layout != "flat" and self.target != "onnx":
            raise OptionError(
                f"--layout {self.layout} was given together with --target {self.target}",
                expected="it with --target onnx",
            )
        if fixed is not None and self.provider != fixed:
            raise OptionError(
                f"--optimize-for {self.provider} was given together with --target {self.target}, "
                f"which is for {fixed}",
                fix="leave one out",
            )
        if self.probe is not None and not self.verify:
            raise OptionError("--probe was given together with --no-verify", fix="leave one out")
        check_target(self.precision, self.target)
        check_runs(self.precision, self.provider)
        self._check_calibration()
        if self.block_method != "rtn" and self.precision not in IN_BLOCKS:
            raise OptionError(
                f"--block-method {self.block_method} was given, and --precision {self.precision} "
                "stores no blocks",
                expected="it with --precision " + ", ".join(IN_BLOCKS),
            )
        self._check_budget()
        _ = self.added  # found, or refused, before anything is read
        if self.precision != "auto" and self.precision_plan is not None:
            raise OptionError(
                f"--precision-plan was given together with --precision {self.precision}",
                expected="--precision auto, which builds the plan as it is",
            )
        self._check_search()
        if names_several(self.task):
            self._check_several()

    def check_tensorrt(self) -> None:
        """Raise OptionError for options of an engine that is not for TensorRT."""
        given = {
            "--profile": self.profile, "--tensorrt-version": self.tensorrt_version,
            "--build": self.build,
        }  # fmt: skip
        for name, value in given.items():
            if value and self.target != "tensorrt":
                raise OptionError(
                    f"{name} was given together with --target {self.target}",
                    expected="it with --target tensorrt",
                )

    def _check_several(self) -> None:
        """Raise OptionError for what an engine of several tasks cannot have."""
        several = "an engine of several tasks"
        if SCHEMES[self.precision].calibrated or self.precision == "auto":
            fits = [n for n, s in SCHEMES.items() if not s.calibrated and n != "auto"]
            raise OptionError(
                f"--precision {self.precision} is chosen by one task's text, and {several} has "
                "several",
                expected="--precision " + ", ".join(fits),
                fix="choose one of those, or export each task by itself",
            )
        if self.layout == "optimum":
            raise OptionError(
                f"--layout optimum was given, and optimum does not tell {several} the tasks of "
                "its rows",
                fix="leave it out, or export each task by itself",
            )
        if self.routing != "exact":
            raise OptionError(
                f"--routing {self.routing} was given, and {several} has no routes that depend on "
                "the input",
                fix="leave it out, or export each task by itself",
            )
        if self.data is not None:
            raise OptionError(
                f"--data was given, and the budget of {several} would be several",
                fix="leave it out and score the engine with `eptc parity --data`, whose rows name "
                "their task",
            )

    def _check_calibration(self) -> None:
        if self.calibration is not None and not self.calibrated:
            raise OptionError(
                f"--calibration was given, and --precision {self.precision} needs none",
                expected="it with "
                + " or ".join(f"--precision {n}" for n, s in SCHEMES.items() if s.calibrated)
                + " or --routing frozen",
                fix="leave it out",
            )
        if self.calibration_method != "minmax" and self.precision not in WITH_RANGES:
            raise OptionError(
                f"--calibration-method {self.calibration_method} was given, and --precision "
                f"{self.precision} has no ranges to choose",
                expected=f"it with --precision {' or '.join(WITH_RANGES)}",
            )
        if self.calibration_method == "entropy" and SCHEMES[self.precision].number == "fp8":
            raise OptionError(
                "--calibration-method entropy was given together with --precision "
                f"{self.precision}: it weighs ranges of 128 equal steps, and those of fp8 are not "
                "equal",
                expected="minmax or percentile",
            )
        if self.precision in WITH_RANGES and self.calibration is None:
            raise OptionError(
                f"--precision {self.precision} fixes the range of every activation, and was given "
                "no text to see them on",
                expected="--calibration FILE: JSON lines with the task's fields, some hundred "
                "rows as they come in production",
            )

    def _check_budget(self) -> None:
        lossy = SCHEMES[self.precision].lossy or self.routing == "frozen"
        if self.data is not None and not lossy:
            raise OptionError(
                f"--data was given, and --precision {self.precision} changes no answer",
                fix="score the engine with `eptc parity --data`, or choose a lower precision",
            )
        for name, value, most in (
            ("--max-drop", self.max_drop, 100.0),
            ("--max-flips", self.max_flips, 1.0),
        ):
            if value is None:
                continue
            if self.data is None:
                raise OptionError(
                    f"{name} was given, and no data to measure it on",
                    expected="--data FILE: JSON lines with the task's fields and `label`",
                )
            if not 0 <= value <= most:  # NaN is not either
                raise OptionError(
                    f"{name} is {value:g}",
                    expected="points from 0 to 100"
                    if name == "--max-drop"
                    else "a share of the rows, such as 1% or 0.01",
                )

    def _check_search(self) -> None:
        searches = self.precision == "auto" and self.precision_plan is None
        for name, value in (
            ("--search-evaluations", self.search_evaluations),
            ("--search-minutes", self.search_minutes),
        ):
            if value is not None and not searches:
                given = "a plan" if self.precision_plan else f"--precision {self.precision}"
                raise OptionError(
                    f"{name} was given, and nothing is searched for {given}",
                    expected="it with --precision auto and a budget, without --precision-plan",
                    fix="leave it out",
                )
        if searches and self.max_drop is None and self.max_flips is None:
            raise OptionError(
                "--precision auto has no budget to keep",
                expected="--max-drop POINTS or --max-flips SHARE, with --data FILE; or a plan, "
                "--precision-plan FILE",
            )
        if self.search_evaluations is not None and self.search_evaluations < _FEWEST:
            raise OptionError(
                f"--search-evaluations is {self.search_evaluations}",
                expected=f"{_FEWEST} or more: two levels, and a few plans",
            )
        if self.search_minutes is not None and not (
            self.search_minutes > 0 and math.isfinite(self.search_minutes)
        ):
            raise OptionError(
                f"--search-minutes is {self.search_minutes:g}", expected="a number above 0"
            )

    def check_task(self, task: Task) -> None:
        """Raise OptionError for a budget that the task cannot be measured by."""
        if self.data is None:
            return
        if task.kind != "regression" and len(task.labels) < 2:
            raise OptionError(
                f"task {task.name!r} has {len(task.labels) or 'no'} labels, so there is no score "
                "and no flip to bound",
                fix="leave out --data and the budget, or describe its labels with --task-spec",
            )
        if task.kind == "regression" and self.max_flips is not None:
            raise OptionError(
                f"--max-flips was given, and task {task.name!r} is a regression: it has values, "
                "no labels that could flip",
                expected="--max-drop",
            )
