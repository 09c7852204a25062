"""`eptc run` and `eptc bench`: ask an engine, and measure it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import eptc
from eptc.cli.common import (
    FOLDER,
    command,
    json_option,
)
from eptc.cli.providers import provider_options
from eptc.errors import OptionError

if TYPE_CHECKING:
    from eptc.runtime import Engine, Provider

__all__ = ["bench", "run"]


def _sizes(_: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return [int(size) for size in value.split(",")]
    except ValueError:
        raise OptionError(
            f"--{parameter.name} is {value!r}", expected="integers separated by commas"
        ) from None


@click.command()
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


@click.command()
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
