"""Text to ids: equal to Hugging Face's, over-long text refused, the tokenizer never changed."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eptc.errors import BundleError, InputError
from eptc.runtime import TextTooLongError, TokenizerSpec
from eptc.runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPEC = TokenizerSpec("tokenizer.json", "base", "right", 0, "pad", 12, True)
TEXTS: tuple[tuple[str, ...], ...] = (
    ("the film was a quiet triumph and the actors were good",),
    ("rain",),
    ("she wrote three letters", "before the train left the station in the morning"),
    ("does the cat sleep on the warm stone or under the old tree", "rain"),
    ("prices rose again in spring while wages", "stayed where they were; rain fell all night"),
)


def make(folder: Path, words: Any, **changes: Any) -> TextTokenizer:
    words.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder / "tokenizer.json", dataclasses.replace(SPEC, **changes))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pair", "end", "start"])
@pytest.mark.parametrize("max_length", [5, 8, 12])
def test_equals_hugging_face(
    tmp_path: Path, make_tokenizer: Callable[[str], Any], kind: str, side: str, max_length: int
) -> None:
    """`truncation=True, padding=True`, with texts and pairs of every length in one batch."""
    from transformers import PreTrainedTokenizerFast

    words = make_tokenizer(kind)
    pad = words.id_to_token(0)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(kind), pad_token=pad, padding_side=side
    )
    ours = make(tmp_path, words, padding_side=side, max_length=max_length)
    for texts in (TEXTS[:2], TEXTS[2:]):
        expected = theirs(
            *(list(column) for column in zip(*texts, strict=True)),
            truncation=True, max_length=max_length, padding=True, return_token_type_ids=True,
        )  # fmt: skip
        found = ours.pad(ours.encode(texts, truncate=True))
        assert list(found) == ["input_ids", "attention_mask", "token_type_ids"]
        for name, array in found.items():
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, expected[name], name)


def test_truncation_side(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    """The manifest says which end is cut."""
    ours = make(tmp_path, make_tokenizer("start"), truncation_side="left", max_length=4)
    (whole,) = make(tmp_path, make_tokenizer("start"), max_length=None).encode(TEXTS[:1])
    (cut,) = ours.encode(TEXTS[:1], truncate=True)
    assert cut.ids == [whole.ids[0], *whole.ids[-3:]]


def test_too_long(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    """Which text, how long it is, how long it may be: in the message and as attributes."""
    ours = make(tmp_path, make_tokenizer("pair"))
    length = len(make_tokenizer("pair").encode(TEXTS[0][0]).ids)
    with pytest.raises(TextTooLongError, match=f"text 1 has {length} tokens") as refusal:
        ours.encode([("rain",), TEXTS[0]])
    assert (refusal.value.position, refusal.value.length, refusal.value.limit) == (1, length, 12)
    assert "truncate=True" in str(refusal.value)
    assert isinstance(refusal.value, InputError)
    exact = dataclasses.replace(SPEC, max_length=length)
    assert TextTokenizer(tmp_path / "tokenizer.json", exact).encode([TEXTS[0]])
    free = make(tmp_path, make_tokenizer("pair"), max_length=None)
    assert len(free.encode([TEXTS[0]], truncate=True)[0].ids) == length


def test_settings_left_in_the_file(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    """The file keeps the padding and truncation of somebody's last call; they do not count."""
    words = make_tokenizer("pair")
    plain = words.encode(TEXTS[0][0]).ids
    words.enable_padding(length=64)
    words.enable_truncation(3)
    ours = make(tmp_path, words, max_length=None)
    assert ours.encode(TEXTS[:1])[0].ids == plain
    assert ours.pad(ours.encode(TEXTS[:1]))["input_ids"].shape == (1, len(plain))


def test_without_token_type_ids(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    ours = make(tmp_path, make_tokenizer("end"), return_token_type_ids=False)
    assert list(ours.pad(ours.encode([("rain",)]))) == ["input_ids", "attention_mask"]


def test_no_tokens(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    """Where no special token is added, an empty text has nothing the engine could read."""
    from tokenizers import processors

    words = make_tokenizer("start")
    words.post_processor = processors.ByteLevel()
    with pytest.raises(InputError, match="text 1 has no tokens: ''"):
        make(tmp_path, words).encode([("rain",), ("",)])
    assert make(tmp_path, make_tokenizer("start")).encode([("",)])[0].ids == [2]


def test_decode(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    """Special tokens are no text."""
    ours = make(tmp_path, make_tokenizer("end"))
    ids = ours.encode([("the cat",)])[0].ids
    assert ids[-1] == 1
    assert ours.decode([*ids, 0, 0]).strip() == "the cat"


def test_threads(tmp_path: Path, make_tokenizer: Callable[[str], Any]) -> None:
    """Calls that cut and calls that do not, at once, each get what they get alone."""
    ours = make(tmp_path, make_tokenizer("pair"))

    def one(i: int) -> list[int] | int:
        if i % 2:
            return list(ours.encode([TEXTS[0]], truncate=True)[0].ids)
        try:
            ours.encode([TEXTS[0]])
        except TextTooLongError as error:
            return error.length
        raise AssertionError

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(200))) == [one(0), one(1)] * 100


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
def test_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match="not a tokenizers file"):
        TextTokenizer(tmp_path / "tokenizer.json", SPEC)
