"""The tokenizer of a bundle: text to padded int64 ids, and back."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from eptc.errors import BundleError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import tokenizers

    from eptc.runtime.graph import NumpyArray
    from eptc.runtime.spec import TokenizerSpec

__all__ = ["TextTokenizer", "TextTooLongError"]


class TextTooLongError(InputError):
    """A text has more tokens than the engine takes.

    Args:
        position: which of the texts, from 0.
        length: its tokens, special tokens included.
        limit: how many the engine takes.
    """

    def __init__(self, position: int, length: int, limit: int) -> None:
        super().__init__(
            f"text {position} has {length} tokens",
            expected=f"{limit} at most, special tokens included",
            fix="shorten it, or pass truncate=True to cut it as training did",
        )
        self.position = position
        self.length = length
        self.limit = limit


class TextTokenizer:
    """Encodes and decodes; nothing of it changes after it is made, so threads may share it.

    `tokenizers` keeps padding and truncation in the tokenizer itself. There are therefore two
    of them, one that cuts and one that does not, and padding is done here.

    Args:
        path: a `tokenizers` file.
        spec: what the manifest says of it.
        limits: further lengths that texts may be cut to: each has a tokenizer of its own.

    Raises:
        BundleError: the file cannot be read.
    """

    def __init__(self, path: Path, spec: TokenizerSpec, limits: Iterable[int | None] = ()) -> None:
        self.spec = spec
        self._plain = _read(path)
        added = self._plain.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._cutting: dict[int | None, tokenizers.Tokenizer] = {None: self._plain}
        for limit in (spec.max_length, *limits):
            if limit is not None and limit not in self._cutting:
                cutting = self._cutting[limit] = _read(path)
                cutting.enable_truncation(
                    limit, strategy="longest_first", direction=spec.truncation_side
                )

    def limited(self, max_length: int | None) -> TextTokenizer:
        """Return the same tokenizer with another bound, one of its `limits`."""
        found = copy.copy(self)
        found.spec = dataclasses.replace(self.spec, max_length=max_length)
        return found

    def encode(
        self,
        texts: Sequence[tuple[str, ...]],
        *,
        truncate: bool = False,
        add_special_tokens: bool = True,
        limits: Sequence[int | None] | None = None,
    ) -> list[tokenizers.Encoding]:
        """Return one encoding per text or pair, not padded.

        Args:
            texts: texts and pairs.
            truncate: cut what is too long.
            add_special_tokens: False where the text already has them.
            limits: most tokens of each text, `max_length` or one of the class's `limits`; None:
                `max_length` for all.

        Raises:
            TextTooLongError: a text above its limit, unless `truncate`.
            InputError: a text without a single token.
        """
        if limits is None:
            limits = [self.spec.max_length] * len(texts)
        batch = [text[0] if len(text) == 1 else text for text in texts]
        found: dict[int, tokenizers.Encoding] = {}
        for limit in dict.fromkeys(limits if truncate else [None]):
            rows = [i for i, own in enumerate(limits) if own == limit or not truncate]
            some = self._cutting[limit].encode_batch(
                [batch[i] for i in rows], add_special_tokens=add_special_tokens
            )
            found.update(zip(rows, some, strict=True))
        encodings = [found[position] for position in range(len(texts))]
        for position, (encoding, limit) in enumerate(zip(encodings, limits, strict=True)):
            length = len(encoding.ids)
            if length == 0:
                raise InputError(f"text {position} has no tokens: {texts[position][0]!r}")
            if limit is not None and length > limit:
                raise TextTooLongError(position, length, limit)
        return encodings

    def pad(self, encodings: Sequence[tokenizers.Encoding]) -> dict[str, NumpyArray]:
        """Return input_ids, attention_mask and, where the engine reads them, token_type_ids.

        All int64 [batch, longest], padded on the manifest's side.
        """
        shape = (len(encodings), max(len(encoding.ids) for encoding in encodings))
        ids = np.full(shape, self.spec.pad_token_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            left = self.spec.padding_side == "left"
            place = slice(shape[1] - length, None) if left else slice(0, length)
            ids[row, place] = encoding.ids
            mask[row, place] = 1
            if self.spec.pair_types:
                types[row, place] = encoding.type_ids
        feeds = {"input_ids": ids, "attention_mask": mask}
        return feeds | {"token_type_ids": types} if self.spec.return_token_type_ids else feeds

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids without special tokens."""
        return str(self._plain.decode(list(ids), skip_special_tokens=True))

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of an answer, without special tokens."""
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def name(self, token: int) -> str:
        """Return a token as the vocabulary spells it; empty where it is not in it."""
        return self._plain.id_to_token(token) or ""

    def has_no_text(self, token: int) -> bool:
        """Return whether `decode` leaves a token out: a special one, or none of the vocabulary."""
        return token in self._special.values() or not self.name(token)

    def special_token(self, name: str) -> int | None:
        """Return the id of a special token; None where no special token has that name."""
        return self._special.get(name)


def _read(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers has no exception of its own
        raise BundleError(f"{path} is not a tokenizers file: {error}") from error
    # The file keeps the settings of the call before it was saved.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
