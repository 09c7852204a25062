"""The output gate of a Hugging Face folder: transformers' own model of it beside the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eptc.errors import ParityError
from eptc.examples_file import Example
from eptc.nn.adapted import ReferenceModel
from eptc.nn.base import is_classifier, refusing
from eptc.parity_gate.compare import FP32, Comparison, compare
from eptc.parity_gate.interface import position_limit
from eptc.parity_gate.outputs import Decision, decide
from eptc.parity_gate.probes import Ints, Probe, builtin_examples, odd_examples, synthetic
from eptc.parity_gate.probes import text_batches as in_shapes
from eptc.tasks import Task, fill
from eptc.text import TrainingTokenizer, pad_token_id

__all__ = ["check_folder_outputs", "check_folder_tokenizer", "folder_probes", "load_folder"]

_BUG = "this is a bug in eptc: report it with the base's configuration files"
# Tokens that are written after a probe.
_WRITTEN = 6
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def load_folder(directory: Path, reference: ReferenceModel, task_id: int) -> Any:
    """Return what `from_pretrained` makes of a folder, in float32.

    Raises:
        ParityError: it cannot be loaded, lacks or has tensors, or its labels or special tokens
            are not the reference's.
    """
    import transformers

    with refusing(directory):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        auto = {
            "T5ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
            "LlamaForCausalLM": transformers.AutoModelForCausalLM,
        }.get(config.architectures[0], transformers.AutoModelForSequenceClassification)
        model, report = auto.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            attn_implementation="eager", output_loading_info=True,
        )  # fmt: skip
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[what])):
            raise ParityError(f"transformers says {what}: {', '.join(names[:3])}", fix=_BUG)
    if type(model) is not type(reference.hf):
        raise ParityError(
            f"the folder loads as {type(model).__name__}",
            expected=type(reference.hf).__name__, fix=_BUG,
        )  # fmt: skip
    _check_settings(model, reference, task_id)
    return model.eval()


def _check_settings(model: Any, reference: ReferenceModel, task_id: int) -> None:
    task = reference.tasks[task_id]
    if is_classifier(model) and task.labels:
        found = tuple(model.config.id2label[i] for i in sorted(model.config.id2label))
        if found != task.labels:
            raise ParityError(
                f"the folder's labels are {found}", expected=str(task.labels), fix=_BUG
            )
    for key in _SPECIAL:
        got, want = _token(model, key), _token(reference.hf, key)
        if got != want:
            raise ParityError(f"the folder's {key} is {got}", expected=str(want), fix=_BUG)


def _token(model: Any, key: str) -> Any:
    value = getattr(getattr(model, "generation_config", None), key, None)
    return getattr(model.config, key, None) if value is None else value


def check_folder_tokenizer(
    directory: Path, tokenizer: TrainingTokenizer, task: Task, examples: Sequence[Example]
) -> int:
    """Compare what the folder's tokenizer makes of texts with the tokenizer of training.

    Returns:
        How many texts were equal.

    Raises:
        ParityError: the first text, or special token, on which they differ.
    """
    own, other = TrainingTokenizer(directory, "folder").tokenizer, tokenizer.tokenizer
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if (got := getattr(own, key)) != (want := getattr(other, key)):
            raise ParityError(
                f"the folder's tokenizer has the {key} {got}", expected=str(want), fix=_BUG
            )
    texts = [fill(task, example) for example in [*examples, *odd_examples(task, None)]]
    for text in texts:
        got, want = dict(own(*text)), dict(other(*text))
        if got != want or own.decode(got["input_ids"]) != other.decode(want["input_ids"]):
            raise ParityError(
                f"the folder's tokenizer makes {got['input_ids'][:12]} of {text!r}",
                expected=str(want["input_ids"][:12]), fix=_BUG,
            )  # fmt: skip
    return len(texts)


def folder_probes(
    reference: ReferenceModel,
    task_id: int,
    tokenizer: TrainingTokenizer | None,
    examples: Sequence[Example] | None,
) -> list[Probe]:
    """Return batches of text, where its form is known, and of seeded tokens.

    Args:
        reference: the unfolded model.
        task_id: the task, by its own list.
        tokenizer: the tokenizer of training; None where there is none.
        examples: texts; None for the built-in ones.
    """
    task, config = reference.tasks[task_id], reference.hf.config
    limit = position_limit(reference)
    left = not (is_classifier(reference.hf) or config.is_encoder_decoder)
    types = int(getattr(config, "type_vocab_size", 0))
    types = types if types > 1 else 0
    probes = []
    if tokenizer is not None and (examples is not None or task.kind != "generation"):
        longest = min(n for n in (limit, task.max_length, 512) if n is not None)
        for name, batch in in_shapes(examples or builtin_examples(task)):
            rows = [
                dict(
                    tokenizer.tokenizer(*fill(task, example), truncation=True, max_length=longest)
                )
                for example in batch
            ]
            pad = pad_token_id(config.to_dict())
            ids, mask = (
                _padded([row[key] for row in rows], filler, left)
                for key, filler in (("input_ids", pad), ("attention_mask", 0))
            )
            kinds = [row.get("token_type_ids", [0] * len(row["input_ids"])) for row in rows]
            probes.append(Probe(name, ids, mask, _padded(kinds, 0, left) if types else None))
    room = None if limit is None else max(1, limit - _WRITTEN)
    return probes + synthetic(int(config.vocab_size), room, token_types=types, left=left)


def _padded(rows: Sequence[Sequence[int]], value: int, left: bool) -> Ints:
    width = max(map(len, rows))
    filled = np.full((len(rows), width), value, np.int64)
    for row, numbers in zip(filled, rows, strict=True):
        row[slice(width - len(numbers), None) if left else slice(len(numbers))] = numbers
    return filled


def check_folder_outputs(
    model: Any, reference: ReferenceModel, task_id: int, probe: Probe
) -> Iterator[Comparison | Decision]:
    """Yield how logits and choices of both models compare on one probe.

    What writes text is given its own greedy tokens, on both sides at once.

    Args:
        model: of the folder.
        reference: the unfolded model.
        task_id: the task, by the reference's own list.
        probe: the batch.
    """
    what = f"logits, {probe.name}"
    with torch.no_grad(), reference.task(reference.tasks[task_id].name):
        feeds = {name: torch.from_numpy(array) for name, array in probe.feeds().items()}
        if is_classifier(model):
            got, want = (each(**feeds).logits.numpy() for each in (model, reference.hf))
            comparison = compare(what, got, want, FP32)
            yield comparison
            chosen = [(row, 0, got[row], want[row]) for row in range(len(want))]
            chosen = chosen if want.shape[1] > 1 else []
        else:
            write = _answered if model.config.is_encoder_decoder else _continued
            feeds, valid = write(model, feeds)
            got, want = (each(**feeds).logits.numpy() for each in (model, reference.hf))
            comparison = compare(what, got, want, FP32, None if valid is None else valid.numpy())
            yield comparison
            chosen = [
                (row, step, got[row, step - _WRITTEN], want[row, step - _WRITTEN])
                for row in range(len(want))
                for step in range(_WRITTEN)
            ]
    for row, step, mine, theirs in chosen:
        yield decide(probe.name, row, step, mine, theirs, 2 * comparison.bound)


def _answered(model: Any, feeds: dict[str, Any]) -> tuple[dict[str, Any], None]:
    """Return what an encoder-decoder is fed to give the logits of its own greedy answer."""
    start = _token(model, "decoder_start_token_id")
    tokens = torch.full((len(feeds["input_ids"]), 1), int(start))
    states = model.get_encoder()(**feeds)
    for _ in range(_WRITTEN - 1):
        logits = model(
            encoder_outputs=states, attention_mask=feeds["attention_mask"],
            decoder_input_ids=tokens,
        ).logits  # fmt: skip
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return {**feeds, "decoder_input_ids": tokens}, None


def _continued(model: Any, feeds: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what a decoder is fed to give the logits of its greedy text, and what counts."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    for step in range(_WRITTEN):
        fed = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        if step == _WRITTEN - 1:
            break
        logits = model(**fed, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return fed, mask.bool()
