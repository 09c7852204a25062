"""The interface gate: task, lengths, special tokens and tokenizer against the reference's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from eptc.errors import ParityError
from eptc.nn.adapted import ReferenceModel
from eptc.parity_gate.probes import Example
from eptc.runtime import Manifest
from eptc.runtime.manifest import bundle_file
from eptc.runtime.tokenizer import TextTokenizer
from eptc.tasks import Task, fill
from eptc.text import TrainingTokenizer

__all__ = ["Tokenizes", "check_layout", "check_manifest", "check_text", "position_limit"]

_FIX = "this is a bug in eptc: report it with the base's configuration files"


class Tokenizes(Protocol):
    """A bundle that turns text into token ids as its engine does: the engine itself is one."""

    @property
    def directory(self) -> Path:
        """Its folder."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""

    def tokenize(
        self, texts: Iterable[Any], *, truncate: bool = False
    ) -> dict[str, npt.NDArray[Any]]:
        """Return input_ids, attention_mask[, token_type_ids], int64 [batch, longest text]."""


def position_limit(reference: ReferenceModel) -> int | None:
    """Return how many positions the reference has for text; None where they are relative.

    A learned table says so itself; rows up to its padding row are never used (RoBERTa).
    """
    model = reference.hf
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = module.padding_idx
            return int(module.num_embeddings) - (0 if padding is None else padding + 1)
    if model.config.is_encoder_decoder:
        return None
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit) - reference.prompts


def check_manifest(manifest: Manifest, reference: ReferenceModel, task_id: int) -> None:
    """Compare what the runtime will act on with what the reference knows by itself.

    Raises:
        ParityError: another task, length limit, or start or stop token.
    """
    task, positions = reference.tasks[task_id], position_limit(reference)
    _same("task", manifest.task, task)
    if manifest.tokenizer is not None:
        limits = [limit for limit in (task.max_length, positions) if limit is not None]
        _same("longest text", manifest.tokenizer.max_length, min(limits, default=None))
    if (generation := manifest.generation) is None:
        return
    _same("number of positions", generation.max_positions, positions)
    stops = _special(reference.hf, "eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    _same("stop tokens", sorted(generation.eos_token_id), sorted(stops))
    if manifest.kind == "encoder-decoder":
        start = _special(reference.hf, "decoder_start_token_id")
        if start is not None:
            _same("start token", generation.decoder_start_token_id, start)


def _special(model: Any, key: str) -> Any:
    """Return a special token: the generation configuration's, else the model's."""
    value = getattr(model.generation_config, key, None)
    return getattr(model.config, key, None) if value is None else value


def _same(what: str, got: object, want: object) -> None:
    if got != want:
        raise ParityError(
            f"the engine's {what} is {got}, the reference has {want}", expected=str(want), fix=_FIX
        )


def check_layout(feeds: Mapping[str, npt.NDArray[Any]], kind: str) -> None:
    """Check on which side a batch is padded: what continues its text has no padding behind it.

    Engine and reference get the same batch, so that a wrong side would mislead both.

    Raises:
        ParityError: the other side.
    """
    mask = feeds["attention_mask"]
    edge = -1 if kind == "decoder-only" else 0
    if not mask[:, edge].all():
        side = "right" if edge else "left"
        raise ParityError(f"the engine pads a {kind} batch on the {side}", fix=_FIX)


def check_text(
    engine: Tokenizes, tokenizer: TrainingTokenizer, task: Task, examples: Sequence[Example]
) -> int:
    """Compare the engine's ids with those of the tokenizer of training, and the text back.

    Args:
        engine: the engine.
        tokenizer: the tokenizer of training.
        task: the reference's task: its template, and the length training cut at.
        examples: texts, also such as are too long or odd.

    Returns:
        How many texts were equal.

    Raises:
        ParityError: the first text on which they differ.
    """
    spec = engine.manifest.tokenizer
    assert spec is not None
    limit = {"truncation": True, "max_length": spec.max_length} if spec.max_length else {}
    own = TextTokenizer(bundle_file(engine.directory, spec.file), spec)
    for example in examples:
        feeds = engine.tokenize([example], truncate=True)
        text = fill(task, example)
        want = dict(tokenizer.tokenizer(*text, **limit))
        # What training never passed to the model was zero there.
        want.setdefault("token_type_ids", [0] * len(want["input_ids"]))
        for name in ("input_ids", "token_type_ids"):
            if name in feeds:
                _equal(f"{name} of {_short(text)}", feeds[name][0].tolist(), list(want[name]))
        if engine.manifest.generation is not None:
            ids = list(want["input_ids"])
            back = tokenizer.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            _equal(f"the text of {ids[:12]}", own.decode(ids), back)
    return len(examples)


def _equal(what: str, got: Any, want: Any) -> None:
    if got == want:
        return
    at = next((i for i in range(min(len(got), len(want))) if got[i] != want[i]), None)
    start = max(0, (min(len(got), len(want)) if at is None else at) - 2)
    raise ParityError(
        f"the engine's tokenizer differs from the training tokenizer: {what} is "
        f"...{got[start : start + 8]!r} from {start} on, length {len(got)}",
        expected=f"...{want[start : start + 8]!r}, length {len(want)}",
        fix="report it with the tokenizer's files",
    )


def _short(text: Sequence[str]) -> str:
    return repr(tuple(part if len(part) <= 40 else f"{part[:40]}..." for part in text))
