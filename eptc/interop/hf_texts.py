"""The texts of a Hugging Face folder: configuration, generation configuration, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import text
from eptc.architectures import Kind
from eptc.bundle import write_json
from eptc.checkpoint import Checkpoint
from eptc.describe import tool_versions
from eptc.interop.base import FolderJob
from eptc.interop.portable import portable_config, portable_tokenizer
from eptc.run_passes import PassRecord
from eptc.tasks import Task

__all__ = ["write_card", "write_texts"]

_SPECIAL = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
_PIPELINES: Mapping[Kind, str] = {
    "encoder-classifier": "text-classification",
    "encoder-decoder": "text2text-generation",
    "decoder-only": "text-generation",
}
_AUTO: Mapping[Kind, str] = {
    "encoder-classifier": "AutoModelForSequenceClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "decoder-only": "AutoModelForCausalLM",
}


def write_texts(
    directory: Path,
    source: Checkpoint,
    task: Task,
    settings: Mapping[str, Any],
    dtype: str,
    tokenizer: text.TrainingTokenizer | None,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files.

    Args:
        directory: an existing folder.
        source: the checkpoint.
        task: the task that was folded.
        settings: the task model's configuration.
        dtype: type that the folder is loaded in, such as `float32`.
        tokenizer: the tokenizer of training.
    """
    family = source.base.architecture
    config = {name: value for name, value in settings.items() if name != "_name_or_path"}
    config |= {"architectures": [family.task_class], "dtype": dtype}
    if family.kind == "encoder-classifier":
        config |= _outputs(task)
    write_json(directory / "config.json", portable_config(config))
    if family.kind != "encoder-classifier":
        write_json(directory / "generation_config.json", _generation(source, settings))
    if tokenizer is None:
        return
    tokenizer.write(directory)
    path = directory / "tokenizer_config.json"
    written = json.loads(path.read_text("utf-8"))
    write_json(path, portable_tokenizer(written, tokenizer.tokenizer.special_tokens_map))


def _outputs(task: Task) -> dict[str, Any]:
    names = task.labels or tuple(f"LABEL_{i}" for i in range(task.num_outputs))
    kind = "regression" if task.kind == "regression" else "single_label_classification"
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": kind,
    }


def _generation(source: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base's generation configuration, or the special tokens of its configuration."""
    found = text.generation_config(source.base.path)
    if not found:
        found = {key: settings[key] for key in _SPECIAL if settings.get(key) is not None}
    start = "decoder_start_token_id"
    if source.base.architecture.kind == "encoder-decoder" and found.get(start) is None:
        # What an engine begins with; `generate` would look for another token, or fail.
        known = settings.get(start)
        found = {**found, start: settings.get("pad_token_id") if known is None else known}
    return dict(sorted(found.items()))


def write_card(
    directory: Path,
    job: FolderJob,
    records: Sequence[PassRecord],
    parity: Mapping[str, Any],
    precision: str,
) -> None:
    """Write the model card, README.md.

    Args:
        directory: the folder.
        job: what was asked for.
        records: what the passes did.
        parity: what was compared, as `eptc.json` says it.
        precision: what the weights are stored as.
    """
    source, task = job.source, job.tasks[0]
    family, auto = source.base.architecture, _AUTO[source.base.architecture.kind]
    tokenizer = (directory / "tokenizer.json").is_file()
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {_PIPELINES[family.kind]}",
        "tags:",
        "- eptc",
        f"- {family.model_type}",
        "---",
        "",
        f"# Task {_code(task.name)}, folded into its base model",
        "",
        f"The adapters of one task ({task.kind}) of a checkpoint with "
        f"{len(source.contents.tasks)}, added to the weights of the base model by eptc. What is "
        "left is a plain model, without adapters.",
        "",
        "```python",
        f"from transformers import {auto}" + (", AutoTokenizer" if tokenizer else ""),
        "",
        f'model = {auto}.from_pretrained("this-folder")',
        *(['tokenizer = AutoTokenizer.from_pretrained("this-folder")'] if tokenizer else []),
        "```",
        "",
        *_described(task),
        "## Where it comes from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _origin(job, precision)),
        "",
        "| pass | contract | largest error, as a part of its bound |",
        "|---|---|---|",
        *_passes(records),
        "",
        "## What it was compared with",
        "",
        *_compared(parity),
        "",
        "`eptc.json` says the same for programs.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def _described(task: Task) -> Iterator[str]:
    if task.prompt:
        fence = _fence(task.prompt, least=3)
        yield from ("It was trained on text in this form:", "", f"{fence}text", task.prompt, fence)
        yield ""
    elif len(task.fields) == 2:
        yield from (f"It was trained on pairs of texts: {task.fields[0]}, {task.fields[1]}.", "")
    if task.labels:
        yield from (f"Labels: {', '.join(map(_code, task.labels))}.", "")


def _code(text: str) -> str:
    """Return text as a span of code, whatever is in it."""
    line, fence = " ".join(text.split()), _fence(text, least=1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _fence(text: str, *, least: int) -> str:
    """Return more backticks than stand side by side in a text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)


def _origin(job: FolderJob, precision: str) -> Iterator[tuple[str, str]]:
    contents, base = job.source.contents, job.source.base
    kind = ", ".join(dict.fromkeys((contents.format, contents.variant)))
    yield "checkpoint", f"{kind}, SHA-256 `{job.source.sha256}`"
    name = _code(job.tasks[0].name).replace("|", "\\|")  # it stands in a table
    yield "task", f"{name}, id {job.task_ids[0]}"
    if contents.top_k is not None:
        yield "experts a task uses", str(contents.top_k)
    yield "base model", f"{base.architecture.model_type}, SHA-256 `{base.sha256}`"
    yield "weights", f"`--precision {precision}`"
    yield "made with", ", ".join(f"{k} {v}" for k, v in tool_versions(("safetensors",)).items())


def _passes(records: Sequence[PassRecord]) -> Iterator[str]:
    for record in records:
        error = "not measured" if record.error is None else f"{record.error:.1e}"
        yield f"| `{record.name}` | {record.contract} | {error} |"


def _compared(parity: Mapping[str, Any]) -> Iterator[str]:
    if not parity["verified"]:
        yield "Nothing: `--no-verify` was given."
        return
    weights, outputs = parity["weights"], parity.get("outputs")
    yield (
        f"The {parity['reference']}, loaded by code of its own. All {weights['tensors']} tensors "
        f"on disk: {weights['tensors'] - weights['adapted']} are the base's to the bit, "
        f"{weights['adapted']} with experts are off by at most "
        f"{weights['largest_deviation']:.2g} of their bound (one rounding to their type and 1e-5 "
        "of what the experts add)."
    )
    if outputs is None:
        yield "Its answers were not compared: both models together did not fit into memory."
        return
    yield (
        f"Loaded in transformers: {outputs['tensors']} tensors of logits, largest error "
        f"{outputs['largest_error']:.2g} (allowed {outputs['its_bound']:.2g}); "
        f"{outputs['decisions']} choices, {outputs['flips']} flips."
    )
