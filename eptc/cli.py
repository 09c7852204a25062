"""The command line: every verb a thin call into the package; only this module prints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import eptc
from eptc.cli_common import (
    FOLDER,
    command,
    json_option,
    progress_shown,
    source_options,
    tensorrt_options,
)
from eptc.cli_providers import provider_options
from eptc.cli_recipe import recipe_options
from eptc.errors import BundleError, OptionError
from eptc.parity_lines import folder_lines, parity_lines
from eptc.precision import SCHEMES

if TYPE_CHECKING:
    from eptc.build import Folder
    from eptc.planning import Plan
    from eptc.runtime import Engine, Provider

__all__ = ["main"]

# Verbs in modules of their own.
_LATE = {"build": "eptc.cli_build", "pack": "eptc.cli_pack", "recipe": "eptc.cli_recipe"}

# What says how a checkpoint is read (`source_options`), and what is scored.
_SOURCE = ("base", "tasks", "top_k", "task_spec", "allow_pickle", "format", "data")


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


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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


def _sizes(_: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(size) for size in value.split(",")]
    except ValueError:
        raise OptionError(
            f"--{parameter.name} is {value!r}", expected="integers separated by commas"
        ) from None


class _Group(click.Group):
    """Runs option callbacks under the same error handling as the commands; loads groups late."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LATE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LATE:
            module = importlib.import_module(_LATE[cmd_name])
            found: click.Command = getattr(module, cmd_name)
            return found
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        return command(super().invoke)(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(eptc.__version__, prog_name="eptc")
def main() -> None:
    """Compile trained EPT checkpoints into small, fast, verified engines.

    Exit codes: 0 done; 1 the engine failed the parity gate; 2 bad usage or bad input; 70 a bug in
    eptc; 130 interrupted.
    """
    # A polite kill ends like Ctrl-C: drafts are removed.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@main.command()
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
    "likewise, for TensorRT. int8-weights, int4: weights alone. auto: for each weight what "
    "--max-drop or --max-flips allows. all: build and compare them, auto where there is a budget.",
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
    click.echo(f"{bundle.path}: {_bytes(size)}, {sum(bundle.seconds.values()):.1f} s")


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
    click.echo(f"{folder.path}: {_bytes(size)}, {sum(folder.seconds.values()):.1f} s")


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


@main.command()
@click.argument("path", type=FOLDER, metavar="CKPT|BUNDLE|PACK")
@source_options
@json_option
@command
def inspect(path: Path, as_json: bool, **options: Any) -> None:
    """Show what a checkpoint, a bundle or a pack holds: tasks, experts, margins, sizes."""
    report = eptc.inspect(path, **options)
    if as_json:
        click.echo(json.dumps(report))
        return
    from eptc.tables import print_inspection

    print_inspection(report)


@main.command()
@click.argument("ckpt", type=FOLDER)
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder to write.")
@source_options
@click.option("--force", is_flag=True, help="Replace what lies at --out.")
@json_option
@command
def convert(ckpt: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a folder of the released code as a native checkpoint, complete from then on."""
    path = eptc.convert(ckpt, out=out, **options)
    click.echo(json.dumps({"checkpoint": str(path)}) if as_json else f"{path}")


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--reference", type=FOLDER, required=True, help="The checkpoint it was made from.")
@click.option("--task", help="Of a pack: the task that is compared.")
@source_options
@click.option("--data", type=FOLDER, help="JSON lines file with labelled examples to score on.")
@provider_options
@click.option(
    "--report",
    "page",
    type=FOLDER,
    help="HTML file to write what is found to, failures as well; makes every check.",
)
@json_option
@command
def parity(
    bundle: Path, reference: Path, page: Path | None, as_json: bool, **options: Any
) -> None:
    """Compare BUNDLE, or a task of a pack, with the unfolded PyTorch model again.

    Exit code 1 where they differ.

    The manifest supplies --tasks and --top-k.
    """
    options["reference"] = reference
    with progress_shown(as_json) as progress:
        if page is None:
            report = eptc.parity(bundle, progress=progress, **options)
        else:
            report = eptc.report(bundle, out=page, progress=progress, **options).checked()
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    for line in parity_lines(report.summary()):
        click.echo(line)
    for name, value in (report.scores or {}).items():
        click.echo(f"{name}: {value}")


@main.command()
@click.argument("bundle", type=FOLDER)
@json_option
@command
def verify(bundle: Path, as_json: bool) -> None:
    """Check hashes, schema and graphs of BUNDLE or a pack; needs no reference, no compiler."""
    report = eptc.verify(bundle)
    if as_json:
        click.echo(json.dumps(report.to_json()))
        sys.exit(0 if report.ok else BundleError.exit_code)
    report.raise_for_problems()
    for warning in report.warnings:
        click.echo(f"eptc: warning: {warning}", err=True)
    click.echo(f"{bundle}: sound, {len(report.files)} files, {len(report.graphs)} graphs")


@main.command()
@click.argument("bundle", type=FOLDER)
@click.argument("texts", nargs=-1, metavar="TEXT...")
@click.option("--pair", "pairs", nargs=2, multiple=True, help="A pair of texts; may be repeated.")
@click.option("--data", type=FOLDER, help="JSON lines file with the task's fields.")
@click.option(
    "--task",
    help="Where BUNDLE serves several: the task of all texts. Without it each line of --data has "
    "its own, in `task`; of a pack it is needed.",
)
@click.option("--folded", is_flag=True, help="Of a pack: in sessions for this task alone.")
@click.option("--truncate", is_flag=True, help="Cut texts that are too long instead of refusing.")
@click.option("--max-new-tokens", type=int, help="Tokens to write at most.")
@click.option("--sample", "do_sample", is_flag=True, help="Draw tokens at random.")
@click.option("--temperature", type=float, help="With --sample: above 1 wilder, below 1 tamer.")
@click.option("--top-k", type=int, help="With --sample: draw from so many likeliest tokens.")
@click.option("--top-p", type=float, help="With --sample: draw from this share of probability.")
@click.option("--seed", type=int, help="With --sample: the same seed draws the same text.")
@click.option("--stop", multiple=True, help="String or special token that ends an answer.")
@click.option("--chat", is_flag=True, help="Put each text into the model's chat template.")
@click.option("--stream", is_flag=True, help="Print text while it is written.")
@provider_options
@json_option
@command
def run(
    bundle: Path,
    texts: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    data: Path | None,
    task: str | None,
    folded: bool,
    truncate: bool,
    stream: bool,
    providers: list[Provider] | None,
    allow_fallback: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer texts with the engine of BUNDLE, or of a pack's task; needs no torch.

    A task with labels answers with a label and its probability, any other with text. An option
    about writing makes a task with labels write too.
    """
    from eptc.runtime.pack import open_engine

    examples = [*texts, *pairs, *(_lines(data) if data is not None else ())]
    if not examples:
        raise OptionError("there is no text", expected="TEXT arguments, --pair or --data")
    if stream and as_json:
        raise OptionError("--stream and --json are both given", fix="leave one of them out")
    # What was given; 0 is a value too.
    writing = {k: v for k, v in given.items() if v is not None and v is not False and v != ()}
    with open_engine(
        bundle, task=task, folded=folded, providers=providers, allow_fallback=allow_fallback
    ) as engine:
        examples, tasks = _with_tasks(engine, examples)
        if stream:
            for i, example in enumerate(examples):
                own = None if tasks is None else tasks[i]
                for piece in engine.stream(example, task=own, truncate=truncate, **writing):
                    click.echo(piece, nl=False)
                click.echo()
            return
        labelled = engine.manifest.kind == "encoder-classifier" or _all_labelled(engine, tasks)
        if labelled and not writing:
            answers: Sequence[Any] = engine.classify(examples, tasks=tasks, truncate=truncate)
        else:
            answers = engine.generate(examples, tasks=tasks, truncate=truncate, **writing)
    if as_json:
        both = zip(examples, answers, strict=True)
        listed = [{"input": example, **dataclasses.asdict(answer)} for example, answer in both]
        click.echo(json.dumps({"answers": listed}))
        return
    for answer in answers:
        click.echo(_answer(answer))


def _with_tasks(engine: Engine, examples: list[Any]) -> tuple[list[Any], list[str] | None]:
    """Return the texts, and the task of each; None where there is one."""
    if not engine.manifest.tasks:
        return examples, None
    found, tasks = [], []
    for example in examples:
        if not isinstance(example, dict) or not isinstance(example.get("task"), str):
            raise OptionError(
                f"the engine serves {len(engine.tasks)} tasks, and {str(example)[:60]!r} names "
                "none",
                expected=", ".join(task.name for task in engine.tasks),
                fix="give --task, or a line of --data with `task`",
            )
        tasks.append(example["task"])
        found.append({key: value for key, value in example.items() if key != "task"})
    return found, tasks


def _all_labelled(engine: Engine, tasks: list[str] | None) -> bool:
    """Whether every task that is asked for has labels to choose from."""
    if not engine.manifest.tasks:
        return all(task.labels for task in engine.tasks) and bool(engine.tasks)
    views = [engine.for_task(name) for name in dict.fromkeys(tasks or ())]
    return all(view.task is not None and view.task.labels for view in views)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--task", help="Where BUNDLE serves several: the task that is measured.")
@click.option("--folded", is_flag=True, help="Of a pack: in sessions for this task alone.")
@click.option("--batch", default="1,8", show_default=True, callback=_sizes, help="Rows a call.")
@click.option(
    "--length", default="32,128", show_default=True, callback=_sizes, help="Tokens a row."
)
@click.option("--max-new-tokens", type=int, help="Tokens to write at most.")
@click.option("--repeat", default=20, show_default=True, help="Calls of each shape.")
@click.option("--threads", type=int, help="CPU threads one operator may use.")
@provider_options
@json_option
@command
def bench(
    bundle: Path,
    batch: list[int],
    length: list[int],
    max_new_tokens: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure BUNDLE's engine on this machine: latency by batch and length.

    The inputs are token ids drawn at random. Needs no torch and no transformers.
    """
    report = eptc.bench(
        bundle, batches=batch, lengths=length, new_tokens=max_new_tokens, **options
    )
    if as_json:
        click.echo(json.dumps(report))
        return
    from eptc.tables import print_bench

    print_bench(report)


@main.command()
@json_option
@command
def doctor(as_json: bool) -> None:
    """Show versions, the execution providers that really start, and what each target needs."""
    report = eptc.doctor()
    if as_json:
        click.echo(json.dumps(report))
        return
    for section, entries in report.items():
        if not entries:
            continue
        click.echo(f"{section}:")
        for name, value in entries.items():
            click.echo(f"  {name}: {value}")


def _answer(answer: Any) -> str:
    """One line: the text, the value, or the label and how likely it is."""
    if hasattr(answer, "text"):
        return str(answer.text)
    if answer.value is not None:
        return f"{answer.value:.4f}"
    label = answer.label if answer.label is not None else answer.index
    return f"{label}\t{answer.probabilities[answer.index]:.3f}"


def _lines(path: Path) -> Iterator[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        examples = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read as JSON lines: {error}") from error
    for example in examples:
        if not isinstance(example, dict):
            raise OptionError(f"{path} has the line {example!r}", expected="JSON objects")
        yield {key: value for key, value in example.items() if key != "label"}


def _predicted(plan: Plan) -> str:
    """Say in words what a build would take."""
    lines = [
        f"engine: {_bytes(plan.weight_bytes)} of weights ({plan.stored})",
        f"compiler: at most {_bytes(plan.compiler_peak)} in memory",
        f"verification: {plan.verification}"
        + (f", at most {_bytes(plan.verifier_peak)} in memory" if plan.verifier_peak else "")
        + (", in a process of its own" if plan.own_process else ""),
        f"time: about {plan.seconds:.0f} s on two cores",
    ]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
