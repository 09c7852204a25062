"""`eptc.export` and `eptc.plan`: every choice of a build, and who makes what was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

from eptc.checkpoint import Routing
from eptc.engine_build import Bundle, build_engine
from eptc.interop.base import Folder
from eptc.interop.targets import export_folder, folder_target
from eptc.interop.triton import REPOSITORIES, export_repository
from eptc.job import Event, Job, Progress, Written
from eptc.lower.blocks import Method
from eptc.options import CalibrationMethod, Layout, Options
from eptc.pass_base import AdapterPass, GraphPass
from eptc.planning import Plan
from eptc.precision import OptimizeFor, Precision
from eptc.tasks import TaskChoice

__all__ = ["Bundle", "Event", "Folder", "Options", "Written", "export", "plan"]


class _Choices(TypedDict, total=False):
    """What `export` takes whatever it writes."""

    task: TaskChoice
    base: str | Path | None
    tasks: Sequence[str] | None
    top_k: int | None
    task_spec: str | Path | None
    probe: str | Path | None
    precision: Precision
    precision_plan: str | Path | None
    calibration: str | Path | None
    calibration_method: CalibrationMethod
    block_method: Method
    data: str | Path | None
    max_drop: float | None
    max_flips: float | None
    search_evaluations: int | None
    search_minutes: float | None
    optimize_for: OptimizeFor | None
    max_memory: int | None
    verify: bool
    allow_pickle: bool
    format: str | None
    routing: Routing
    passes: Sequence[str | AdapterPass | GraphPass]
    max_rank: int | None
    genai_python: str | Path | None
    profile: Sequence[str]
    tensorrt_version: str | None
    build: bool
    force: bool
    progress: Progress
    rejected: Callable[[Path], object] | None


@overload
def export(  # type: ignore[overload-overlap]  # `str` has the names of targets yet to be installed
    ckpt: str | Path,
    *,
    out: str | Path,
    target: Literal["lora", "hf", "genai", "triton"],
    **choices: Unpack[_Choices],
) -> Folder: ...


@overload
def export(
    ckpt: str | Path,
    *,
    out: str | Path,
    layout: Literal["pack"],
    target: Literal["onnx"] = ...,
    **choices: Unpack[_Choices],
) -> Folder: ...


@overload
def export(
    ckpt: str | Path,
    *,
    out: str | Path,
    target: str = ...,
    layout: Literal["flat", "optimum"] = ...,
    **choices: Unpack[_Choices],
) -> Bundle: ...


def export(
    ckpt: str | Path,
    *,
    task: TaskChoice = None,
    out: str | Path,
    base: str | Path | None = None,
    target: str = "onnx",
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    probe: str | Path | None = None,
    precision: Precision = "fp32",
    precision_plan: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_method: CalibrationMethod = "minmax",
    block_method: Method = "rtn",
    data: str | Path | None = None,
    max_drop: float | None = None,
    max_flips: float | None = None,
    search_evaluations: int | None = None,
    search_minutes: float | None = None,
    optimize_for: OptimizeFor | None = None,
    max_memory: int | None = None,
    verify: bool = True,
    allow_pickle: bool = False,
    format: str | None = None,
    routing: Routing = "exact",
    passes: Sequence[str | AdapterPass | GraphPass] = (),
    max_rank: int | None = None,
    layout: Layout = "flat",
    genai_python: str | Path | None = None,
    profile: Sequence[str] = (),
    tensorrt_version: str | None = None,
    build: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
    rejected: Callable[[Path], object] | None = None,
) -> Bundle | Folder:
    """Compile one task of a checkpoint into a verified engine, or write it for other programs.

    Args:
        ckpt: folder of a native checkpoint or of the released EPT code.
        task: the task's name, an alias of it, or its id; None where the checkpoint has one. For
            `lora` and `triton` also several of them, a list or text with commas in it, or `all`.
        out: folder of the bundle: new, empty, or replaced with `force`.
        base: folder of the base model.
        target: what to write: `onnx`; `tensorrt`, the same of what TensorRT takes, with what
            builds its engines beside it; `lora`, a stock PEFT adapter for each task; `hf`, the
            folded model for transformers; `genai`, the same for onnxruntime-genai; `triton`, a
            model repository for Triton; or a target of an installed package.
        tasks: task names in id order, where the checkpoint does not store them.
        top_k: experts a task uses, where the checkpoint does not store it.
        task_spec: JSON file with prompts and labels of tasks that are not the published ones.
        probe: JSON lines file with examples to verify on; None for built-in text.
        precision: `fp32`; `keep`: matrices are stored in the base's own 16-bit type, folded ones
            rounded to it once, and computed in float32; `fp16` and `bf16`: stored and computed in
            16 bits where that is safe; `int8`: integers, activations quantised as they come;
            `int8-static`: activations too by ranges seen on `calibration`; `fp8`: likewise, in
            8-bit floating point, for TensorRT; `int8-fp16` and `fp8-fp16`: the same products, with
            fp16 for the rest; `int8-weights` and `int4`: weights alone, in
            blocks; `auto`: for each weight what the budget allows.
        precision_plan: JSON file with a level for each weight, as `precision.json` of a bundle
            that was built with `auto`; with `auto`, instead of a search.
        calibration: JSON lines file with texts to see the ranges of activations on; None, where
            the precision does not demand it: `data`, `probe` or the built-in text.
        calibration_method: how ranges follow from what was seen: `minmax`, `entropy` or
            `percentile`.
        block_method: how the scales of blocks are chosen: `rtn`, by the largest and smallest
            number, or `k-quant`, by least squares: slower, and a little nearer.
        data: JSON lines file with labelled examples that a lossy engine is scored on beside the
            exact one.
        max_drop: points (hundredths) of the task's metric that may be lost on `data`.
        max_flips: share of the rows of `data` whose label may change where the exact engine is
            sure. Where neither is given but `data` is, 0.01; for a regression, a point may be
            lost.
        search_evaluations: engines that a search for `auto` may try; None: 100.
        search_minutes: wall time after which it takes the best plan so far; None: no limit.
        optimize_for: the execution provider whose kernels the graphs are fused for, `cpu` or
            `cuda`; `any`: standard operators only; None: what the target is for, else `cpu`.
        max_memory: bytes that each process of the build may have resident; None: what is
            available now. Where the whole model does not fit it is verified block by block.
        verify: False publishes an engine nobody compared with anything; the manifest says so.
        allow_pickle: read `.bin` files (weights only).
        format: of the checkpoint, a name of `eptc.checkpoint.FORMATS` or of an installed package's
            format; None: what its folder looks like.
        routing: what becomes of routes that depend on the input. `exact`: what the system's own
            code does; `per-sample` and `batch`: each row by itself, or the rows of a batch
            together, where the system mixes them up; `frozen`: their mean over calibration text,
            folded, which is lossy.
        passes: exact passes of other packages to run beside eptc's own: `NAME` or
            `NAME:option=value,option=value` of an installed one, or the pass itself.
        max_rank: for `lora`: ranks above it are cut by a singular value decomposition, which is
            lossy; None: none is.
        layout: of a bundle: `flat`; `optimum`, which optimum-onnx's ORTModel classes load too; or
            `pack`: several tasks over one base, to be loaded with `eptc.Pack`.
        genai_python: for `genai`: an interpreter that has onnxruntime-genai; None: what the
            environment variable `EPTC_GENAI_PYTHON` names, else this one.
        profile: for `tensorrt`: sizes that engines are built for, `NAME=MIN:OPT:MAX` for a
            dimension; what is not named follows from the lengths of `probe`, or has a default.
        tensorrt_version: for `tensorrt`: what the graphs and the commands are for; None: the
            newest whose operators are known.
        build: for `tensorrt`: build the engines here and prove them too; needs the package
            `tensorrt` and a GPU.
        force: replace what lies at `out`.
        progress: called with each stage (a string), each finished pass and, while weights are
            written, how many are.
        rejected: called with the folder of an engine that was written and did not pass, before it
            is removed.

    Returns:
        The published bundle; for `lora`, `hf`, `genai` and `triton` the published folder.

    Raises:
        InputError: something about the input; nothing was written.
        ParityError: the engine does not give the reference's answers, or loses more of them than
            its precision or the budget allows; nothing was published.
    """
    options = Options(
        task, base, target, tasks, top_k, task_spec, probe, precision, precision_plan, calibration,
        calibration_method, block_method, data, max_drop, max_flips, search_evaluations,
        search_minutes, optimize_for, max_memory, verify, allow_pickle, format, routing,
        passes, max_rank, layout, genai_python, profile, tensorrt_version, build,
    )  # fmt: skip
    if folder_target(target, layout) is not None:
        return export_folder(ckpt, options, out=out, force=force, progress=progress)
    if target in REPOSITORIES:
        given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        settings = {**given, "target": "onnx"}
        del settings["task"]
        return export_repository(
            export, ckpt, options, settings, out=out, force=force, progress=progress
        )
    return build_engine(
        ckpt, options, out=Path(out), force=force, progress=progress, rejected=rejected
    )


def plan(ckpt: str | Path, **options: Any) -> Plan:
    """Predict what a build takes, before any weight is read.

    Args:
        ckpt: folder of the checkpoint.
        options: as for `export`, without `out`, `force` and `progress`.

    Raises:
        InputError: something about the input.
    """
    return Job.read(ckpt, Options(**options)).plan
