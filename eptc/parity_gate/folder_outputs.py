"""The output gate of a Hugging Face folder: transformers' own model of it beside the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc.architectures import Kind
from eptc.errors import ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.nn.base import refusing
from eptc.parity_gate.adapter_probes import choices, logits
from eptc.parity_gate.compare import FP32, Comparison
from eptc.parity_gate.outputs import Decision
from eptc.parity_gate.probes import Example, Probe, odd_examples
from eptc.parity_gate.sensitivity import compare_beside_rounding
from eptc.tasks import Task, fill
from eptc.text import TrainingTokenizer

__all__ = ["check_folder_outputs", "check_folder_tokenizer", "load_folder"]

Float32 = npt.NDArray[np.float32]
_BUG = "this is a bug in eptc: report it with the base's configuration files"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def load_folder(directory: Path, reference: ReferenceModel, task: Task, kind: Kind) -> Any:
    """Return what `from_pretrained` makes of a folder, in float32.

    Args:
        directory: the folder.
        reference: the unfolded model.
        task: the task, by the reference's own list.
        kind: of model.

    Raises:
        ParityError: it lacks tensors or has more, or its labels or special tokens are not the
            reference's.
        BaseModelError: it cannot be loaded.
    """
    import transformers

    auto = {
        "encoder-classifier": transformers.AutoModelForSequenceClassification,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "decoder-only": transformers.AutoModelForCausalLM,
    }[kind]
    with refusing(directory):
        model, report = auto.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, use_safetensors=True,
            attn_implementation="eager", output_loading_info=True,
        )  # fmt: skip
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[what])):
            raise ParityError(f"transformers reports {what}: {', '.join(names[:3])}", fix=_BUG)
    _check_settings(model, reference, task, kind)
    return model.eval()


def _check_settings(model: Any, reference: ReferenceModel, task: Task, kind: Kind) -> None:
    """Compare what `generate` and pipelines act on with what the reference knows by itself."""
    if type(model) is not type(reference.hf):
        _same("model", type(model).__name__, type(reference.hf).__name__)
    if kind == "encoder-classifier" and task.labels:
        names = model.config.id2label
        _same("labels", tuple(names[i] for i in sorted(names)), task.labels)
    for key in _SPECIAL:
        _same(key, _token(model, key), _token(reference.hf, key))


def _same(what: str, got: object, want: object) -> None:
    if got != want:
        raise ParityError(f"the folder's {what} is {got}", expected=str(want), fix=_BUG)


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
        _same(f"tokenizer's {key}", getattr(own, key), getattr(other, key))
    texts = [fill(task, example) for example in [*examples, *odd_examples(task, None)]]
    for text in texts:
        got, want = dict(own(*text)), dict(other(*text))
        _same(f"tokens of {text!r}", got, want)
        _same("text of them", own.decode(got["input_ids"]), other.decode(want["input_ids"]))
    return len(texts)


def check_folder_outputs(
    model: Any, reference: ReferenceModel, task: Task, kind: Kind, probe: Probe
) -> Iterator[Comparison | Decision]:
    """Yield how logits and choices of both models compare on one probe.

    Args:
        model: of the folder.
        reference: the unfolded model.
        task: the task, by the reference's own list.
        kind: of model.
        probe: the batch.
    """

    def answer() -> Float32:
        return logits(reference.hf, probe, kind)

    with torch.no_grad(), reference.task(task.name):
        got, want = logits(model, probe, kind), answer()
        comparison, bound = compare_beside_rounding(
            f"logits, {probe.name}", got, want, FP32, model=reference.hf, again=answer
        )
    yield comparison
    yield from choices(probe.name, got, want, kind, bound)
