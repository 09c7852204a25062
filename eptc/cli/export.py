"""`eptc export`: compile tasks of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import eptc
from eptc.cli.common import (
    FOLDER,
    command,
    json_option,
    progress_shown,
    source_options,
    tensorrt_options,
)
from eptc.cli.recipe import recipe_options
from eptc.errors import OptionError
from eptc.parity_lines import folder_lines, parity_lines
from eptc.precision import SCHEMES
from eptc.units import readable_size

if TYPE_CHECKING:
    from eptc.build import Folder
    from eptc.planning import Plan

__all__ = ["export"]

# What says how a checkpoint is read (`source_options`), and what is scored.
_SOURCE = ("base", "tasks", "top_k", "task_spec", "allow_pickle", "format", "data")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _share(_: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read a share such as `1%` or `0.01`."""
    if value is None:
        return None
    number, percent = value.strip().removesuffix("%"), value.strip().endswith("%")
    option = str(parameter.name).replace("_", "-")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise OptionError(
            f"--{option} is {value!r}", expected="a share such as 1% or 0.01"
        ) from None
    if share >= 1 and not percent:
        raise OptionError(
            f"--{option} is {value!r}, which may mean one row in a hundred or every row",
            expected="1% or 0.01; 100% for every row",
        )
    return share


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Read a size such as `1.5GB` or `800MiB`."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", value.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise OptionError(
            f"--max-memory is {value!r}", expected="a size such as 1.5GB, 800MB or 2GiB"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


@click.command()
@click.argument("ckpt", type=FOLDER, required=False)
@click.option(
    "--task",
    help="Name, alias or id of the task to compile; not needed where there is one. Several, comma "
    "separated, or all: one engine whose rows name their task; with --target lora a folder for "
    "each; with --target triton a model for each and one for all.",
)
@click.option(
    "--target",
    default="onnx",
    show_default=True,
    metavar="NAME",
    help="What to write. onnx: an engine. tensorrt: one of what TensorRT takes, with a script and "
    "commands that build its engines. lora: a stock PEFT adapter, for PEFT and programs that "
    "serve such. hf: the folded model as a folder for transformers. genai: the same, built for "
    "onnxruntime-genai. triton: a model repository for Triton. Or a target of an installed "
    "package.",
)
@click.option("-o", "--out", type=FOLDER, help="Folder of the bundle.")
@source_options
@click.option(
    "--probe", type=FOLDER, help="JSON lines file with examples to verify on (fields, label)."
)
@click.option(
    "--precision",
    type=click.Choice([*SCHEMES, "all"]),
    default="fp32",
    show_default=True,
    help="keep: store matrices in the base's own 16-bit type. fp16, bf16: compute in 16 bits. "
    "int8: integers. int8-static: integers with ranges from --calibration. fp8: 8-bit floats "
    "likewise, for TensorRT. int8-fp16, fp8-fp16: those products between fp16. int8-weights, "
    "int4: weights alone. auto: for each weight what --max-drop or --max-flips allows. all: build "
    "and compare them, auto where there is a budget.",
)
@click.option(
    "--precision-plan",
    type=FOLDER,
    help="With auto: JSON file with a level for each weight, instead of a search.",
)
@click.option(
    "--calibration",
    type=FOLDER,
    help="JSON lines file with texts to see the ranges of activations on.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(["minmax", "entropy", "percentile"]),
    default="minmax",
    show_default=True,
    help="How ranges follow from what was seen.",
)
@click.option(
    "--block-method",
    type=click.Choice(["rtn", "k-quant"]),
    default="rtn",
    show_default=True,
    help="How the scales of int4 and int8-weights are chosen; k-quant is slower and a little "
    "nearer.",
)
@click.option(
    "--data",
    type=FOLDER,
    help="JSON lines file with labelled examples to score a lower precision on.",
)
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="Points of the task's metric that may be lost on --data.",
)
@click.option(
    "--max-flips",
    metavar="SHARE",
    callback=_share,
    help="Share of --data, such as 1%, whose label may change where float32 is sure.",
)
@click.option(
    "--search-evaluations",
    type=int,
    show_default="100",
    help="Engines that auto may try.",
)
@click.option(
    "--search-minutes", type=float, help="Time after which auto takes the best plan so far."
)
@click.option(
    "--routing",
    type=click.Choice(["exact", "frozen", "batch", "per-sample"]),
    default="exact",
    show_default=True,
    help="What becomes of routes that depend on the input. exact: as the system's own code does. "
    "per-sample, batch: each row by itself, or a batch together. frozen: their mean over "
    "calibration text, folded (lossy).",
)
@click.option(
    "--optimize-for",
    type=click.Choice(["cpu", "cuda", "any"]),
    help="Execution provider whose kernels to fuse for; any: standard operators only. Without "
    "it: what the target is for, else cpu.",
)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="Run an exact pass of an installed package as well; may be repeated.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    callback=_size,
    help="What each process may have in memory, such as 1.5GB; what does not fit is verified "
    "block by block. Without it: what is available.",
)
@click.option(
    "--max-rank",
    type=int,
    metavar="N",
    help="With --target lora: cut ranks above it, by singular values; lossy, and measured.",
)
@click.option(
    "--layout",
    type=click.Choice(["flat", "optimum", "pack"]),
    default="flat",
    show_default=True,
    help="Names and files of the bundle. optimum: those that optimum-onnx's ORTModel classes "
    "load as well. pack: several tasks (--task all or a,b) over one base, one small file for each "
    "task; see `eptc pack`.",
)
@click.option(
    "--genai-python",
    metavar="PATH",
    help="With --target genai: Python of an environment that has onnxruntime-genai. Without it: "
    "what EPTC_GENAI_PYTHON names, else this one.",
)
@tensorrt_options
@click.option(
    "--dry-run", is_flag=True, help="Say what the build would take; read no weight, write nothing."
)
@click.option("--no-verify", is_flag=True, help="Skip parity; the manifest records it.")
@click.option(
    "--report",
    "page",
    type=FOLDER,
    help="HTML file about the engine, or about one that was written and did not pass.",
)
@click.option("--force", is_flag=True, help="Replace what lies at --out.")
@click.option("-v", "--verbose", is_flag=True, help="Show stages and passes in a pipe as well.")
@json_option
@command
@recipe_options
def export(
    ckpt: Path,
    task: str | None,
    target: str,
    out: Path | None,
    dry_run: bool,
    force: bool,
    no_verify: bool,
    page: Path | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile one task, or several, of the checkpoint CKPT into a verified engine.

    The engine is compared with the unfolded PyTorch model before it is published. Where they
    differ, nothing is published and the exit code is 1. Below float32 that holds for the engine
    before its precision is lowered; what is lost then is bounded for each precision, and by
    --max-drop and --max-flips on --data.

    With --target lora tasks become stock PEFT adapters, compared likewise.
    """
    options |= {"task": task, "target": target, "verify": not no_verify}
    if options["precision"] == "all" and not _writes_folder(target, options["layout"]):
        if dry_run or force or page is not None:
            other = "--dry-run" if dry_run else "--force" if force else "--report"
            raise OptionError(
                f"--precision all was given together with {other}", fix="leave one out"
            )
        _export_all(ckpt, out, verbose, as_json, options)
        return
    if page is not None and (dry_run or _writes_folder(target, options["layout"])):
        raise OptionError("--report is about an engine, and none is made", fix="leave it out")
    if dry_run:
        plan = eptc.plan(ckpt, **options)
        click.echo(json.dumps(plan.to_json()) if as_json else _predicted(plan))
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out'.")
    with progress_shown(as_json, verbose) as progress:
        write_page: Callable[..., object] | None = None
        if page is not None:
            from eptc.page import check_out

            check_out(page, out)
            given = {name: options[name] for name in _SOURCE} | {"reference": ckpt, "out": page}
            write_page = functools.partial(
                eptc.report, called=out.name, progress=progress, **given
            )
        bundle = eptc.export(
            ckpt, out=out, force=force, progress=progress, rejected=write_page, **options
        )
        if write_page is not None and isinstance(bundle, eptc.Bundle):
            write_page(bundle.path, seconds={r.name: r.seconds for r in bundle.passes})
    if not isinstance(bundle, eptc.Bundle):
        _print_folder(bundle, as_json)
        return
    parity = dict(bundle.manifest.parity)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": str(bundle.path),
                    "task": bundle.manifest.task.name if bundle.manifest.task else None,
                    "tasks": [task.name for task in bundle.manifest.tasks],
                    "passes": [dataclasses.asdict(record) for record in bundle.passes],
                    "seconds": bundle.seconds,
                    "files": {n: f.size for n, f in bundle.manifest.files.items()},
                    "parity": parity,
                    "warnings": bundle.warnings,
                }
            )
        )
        return
    for warning in bundle.warnings:
        click.echo(f"eptc: warning: {warning}", err=True)
    size = sum(record.size for record in bundle.manifest.files.values())
    if not parity["verified"]:
        click.echo("NOT VERIFIED: --no-verify was given, and the manifest says so")
    for line in parity_lines(parity):
        click.echo(line)
    if scores := parity.get("scores"):
        low, high = (100 * points for points in scores["drop_interval"])
        click.echo(
            f"{scores['metric']} {scores['engine']:.4f} of {scores['reference']:.4f} on "
            f"{scores['rows']} rows: {100 * scores['drop']:.2f} points lost ({low:.2f} to "
            f"{high:.2f}); {scores['flips']} labels changed, {scores['flips_beyond_noise']} where "
            "float32 is sure" + _claim(scores)
        )
    click.echo(f"{bundle.path}: {readable_size(size)}, {sum(bundle.seconds.values()):.1f} s")


def _writes_folder(target: str, layout: str) -> bool:
    from eptc.interop.targets import folder_target

    return folder_target(target, layout) is not None


def _print_folder(folder: Folder, as_json: bool) -> None:
    """Print what a target wrote that is no engine."""
    if as_json:
        click.echo(json.dumps(folder.to_json()))
        return
    from eptc.tables import print_adapters, print_tasks

    for warning in folder.warnings:
        click.echo(f"eptc: warning: {warning}", err=True)
    if not all(found["verified"] for found in folder.parity.values()):
        click.echo("NOT VERIFIED: --no-verify was given, and what was written says so")
    if folder.target == "lora":
        print_adapters(folder)
    elif folder.target == "onnx":
        print_tasks(folder.details)
    else:
        lines = parity_lines if folder.target == "triton" else folder_lines
        for name, found in folder.parity.items():
            for line in lines(found):
                click.echo(f"{name}: {line}" if folder.target == "triton" else line)
    size = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    click.echo(f"{folder.path}: {readable_size(size)}, {sum(folder.seconds.values()):.1f} s")


def _claim(scores: Mapping[str, Any]) -> str:
    if scores.get("chosen_on_these_rows"):
        return "; the plan was chosen on these rows: score it on others with `eptc parity --data`"
    return "" if scores["claimed"] else "; too few rows for a claim"


def _export_all(
    ckpt: Path, out: Path | None, verbose: bool, as_json: bool, options: dict[str, Any]
) -> None:
    """Build every precision and print them side by side."""
    if out is None:
        raise click.UsageError("Missing option '-o' / '--out'.")
    del options["precision"]
    with progress_shown(as_json, verbose) as progress:
        comparison = eptc.compare_precisions(ckpt, out=out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(comparison.to_json()))
        return
    from eptc.tables import print_comparison

    print_comparison(comparison)
    click.echo(f"{comparison.path}: comparison.md, comparison.json, comparison.svg, and a bundle "
               "for each precision")  # fmt: skip


def _predicted(plan: Plan) -> str:
    """Say in words what a build would take."""
    lines = [
        f"engine: {readable_size(plan.weight_bytes)} of weights ({plan.stored})",
        f"compiler: at most {readable_size(plan.compiler_peak)} in memory",
        f"verification: {plan.verification}"
        + (
            f", at most {readable_size(plan.verifier_peak)} in memory"
            if plan.verifier_peak
            else ""
        )
        + (", in a process of its own" if plan.own_process else ""),
        f"time: about {plan.seconds:.0f} s on two cores",
    ]
    return "\n".join(lines)
