"""The tokenizer of a build: whose it is, its files made equal on every machine."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptc.bundle import write_json
from eptc.checkpoint.base import read_json, refuse_outside
from eptc.errors import BaseModelError
from eptc.runtime.spec import TokenizerSpec
from eptc.tasks import Task

__all__ = ["CHAT_TEMPLATE", "TrainingTokenizer", "find_tokenizer", "has_tokenizer"]

CHAT_TEMPLATE = "chat_template.jinja"

_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model",
          "vocab.txt", "vocab.json")  # fmt: skip
# Keys of tokenizer_config.json that depend on where and how the tokenizer was loaded.
_UNSTABLE = ("name_or_path", "local_files_only", "is_local", "_commit_hash", "tokenizer_file",
             "vocab_file", "merges_file", "padding", "truncation")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainingTokenizer:
    """The tokenizer the adapters were trained with, as transformers loads it.

    Args:
        folder: where its files are.
        source: `checkpoint` where the checkpoint has one of its own, else `base`.
    """

    folder: Path
    source: str

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers makes it.

        Raises:
            BaseModelError: transformers cannot load it, or it has no fast form.
        """
        from transformers import AutoTokenizer

        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of old tokenizer files; nothing a caller can act on
                tokenizer = AutoTokenizer.from_pretrained(
                    str(self.folder), local_files_only=True, trust_remote_code=False
                )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise BaseModelError(
                f"the tokenizer in {self.folder} cannot be loaded: {error}",
                fix="copy the tokenizer's files again",
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise BaseModelError(
                f"the tokenizer in {self.folder} ({type(tokenizer).__name__}) has no fast form",
                expected="one that the tokenizers library can run",
                fix="save it with transformers as tokenizer.json first",
            )
        return tokenizer

    def write(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, free of the state of the last call."""
        data = json.loads(self.tokenizer.backend_tokenizer.to_str())
        data["padding"] = data["truncation"] = None
        write_json(directory / "tokenizer.json", data)
        path = self.folder / "tokenizer_config.json"
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        config = {key: config[key] for key in sorted(config) if key not in _UNSTABLE}
        write_json(directory / "tokenizer_config.json", config)

        template = self.chat_template
        if template is not None:
            (directory / CHAT_TEMPLATE).write_bytes(template.encode("utf-8"))

    @property
    def chat_template(self) -> str | None:
        """The template for conversations, as transformers finds it; None where there is none."""
        template = self.tokenizer.chat_template
        if isinstance(template, Mapping):  # several by name; others are for tools and documents
            template = template.get("default")
        return None if template is None else str(template)

    def spec(
        self,
        config: Mapping[str, Any],
        task: Task | None,
        *,
        kind: str,
        token_types: bool,
        taken: int = 0,
    ) -> TokenizerSpec:
        """Return how the runtime pads and cuts, as training did.

        Args:
            config: the base's configuration.
            task: the task, for its truncation length.
            kind: of engine; what continues its text is padded on the left.
            token_types: whether the engine reads token_type_ids.
            taken: positions that prompts before the text take.
        """
        positions = max_positions(config)
        limits = [
            task.max_length if task is not None else None,
            None if positions is None else positions - taken,
        ]
        known = [limit for limit in limits if limit is not None]
        chats = kind == "decoder-only" and self.chat_template is not None
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = pad_token_id(config)
        return TokenizerSpec(
            file="tokenizer.json",
            source=self.source,
            padding_side="left" if kind == "decoder-only" else "right",
            pad_token_id=int(pad),
            pad_token=self.tokenizer.pad_token,
            max_length=min(known) if known else None,
            return_token_type_ids=token_types,
            truncation_side=self.tokenizer.truncation_side,
            pair_types="token_type_ids" in self.tokenizer.model_input_names,
            chat_template=CHAT_TEMPLATE if chats else None,
            special_tokens={
                name: str(token)
                for name, token in sorted(self.tokenizer.special_tokens_map.items())
                if chats and isinstance(token, str)
            },
        )


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model has; None where they are relative (T5).

    RoBERTa counts positions from padding_idx + 1 on, so the first ones are never used.
    """
    positions = config.get("max_position_embeddings")
    if positions is None or config.get("model_type") == "t5":
        return None
    if config.get("model_type") == "roberta":
        return int(positions) - int(config.get("pad_token_id", 1)) - 1
    return int(positions)


def pad_token_id(config: Mapping[str, Any]) -> int:
    """Return the id that fills a batch: the model's own, else its first end token, else 0.

    Padding is masked; any id of the vocabulary gives the same answers.
    """
    for key in ("pad_token_id", "eos_token_id"):
        value = config.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and value >= 0:
            return value
    return 0


def has_tokenizer(checkpoint: Path, base: Path) -> bool:
    """Whether a checkpoint or its base has a tokenizer; none is loaded."""
    return any((folder / name).is_file() for folder in (checkpoint, base) for name in _FILES)


def find_tokenizer(checkpoint: Path, base: Path) -> TrainingTokenizer | None:
    """Return the checkpoint's tokenizer if it has one, else the base's, else None; loaded.

    Raises:
        BaseModelError: transformers cannot load it, or it names files outside its folder.
    """
    for folder, source in ((checkpoint, "checkpoint"), (base, "base")):
        if any((folder / name).is_file() for name in _FILES):
            refuse_outside(folder)
            found = TrainingTokenizer(folder, source)
            assert found.tokenizer is not None  # a bad one is better met now than after a build
            return found
    return None


def generation_config(base: Path) -> dict[str, Any]:
    """Return the base's generation configuration without what depends on its writer."""
    path = base / "generation_config.json"
    if not path.is_file():
        return {}
    data = read_json(path, BaseModelError)
    for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        value = data.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(token is None or type(token) is int for token in ids):
            raise BaseModelError(f"{key} in {path} is {value!r}", expected="a token's id")
    return {k: v for k, v in data.items() if not k.startswith("_") and k != "transformers_version"}


def answer_length(task: Task, tokenizer: TrainingTokenizer | None, variant: str) -> int:
    """Return how many tokens an answer may have where the caller does not say.

    The released code evaluates with 10. Otherwise the longest label and its end token, 64 where
    there are no labels.
    """
    if variant == "released":
        return 10
    if not task.labels or tokenizer is None:
        return 64
    encode = functools.partial(tokenizer.tokenizer.encode, add_special_tokens=False)
    return 1 + max(len(encode(label)) for label in task.labels)


def answer_frame(
    tokenizer: TrainingTokenizer | None, kind: str, variant: str
) -> tuple[tuple[int, ...], bool]:
    """Return the tokens that training put before each answer, and whether it taught an end.

    The released code gives a Llama's answer the special tokens of a text of its own, a BOS, and
    masks the end. T5's answers, and those of native checkpoints, are the answer's tokens and an
    end.
    """
    if variant != "released" or kind != "decoder-only" or tokenizer is None:
        return (), True
    return tuple(tokenizer.tokenizer.encode("")), False
