"""Text while it is written: whole characters, the whole text, stop strings across tokens."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from eptc.errors import InputError, OptionError, TaskError
from eptc.runtime import MANIFEST, Engine, TokenizerSpec, decoding
from eptc.runtime.detokenize import StopText, TextStream
from eptc.runtime.seal import sealed
from eptc.runtime.tokenizer import TextTokenizer

TEXTS = (
    "naïve café -- 東京 🦙🏽 done",
    "the  film   was\ngood ",
    "日本語🙂x",
    "\N{REPLACEMENT CHARACTER}a",
)


def byte_fallback() -> tokenizers.Tokenizer:
    """Make a tokenizer as Llama's: words with a mark for the space, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁film", "film", "s", "é", "▁東", "▁▁"]
    made = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    made.add_special_tokens(["<s>", "</s>"])
    return made


def metaspace() -> tokenizers.Tokenizer:
    """Make a tokenizer as T5's."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁the", "▁film", "film", "s", "é", "▁東", "▁▁"]
    made = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 2, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>"])
    return made


@pytest.fixture(params=["bytes", "words", "byte fallback", "metaspace"])
def words(request: pytest.FixtureRequest, tmp_path: Path, make_tokenizer: Any) -> TextTokenizer:
    kinds = {"byte fallback": byte_fallback, "metaspace": metaspace}
    names = {"bytes": "start", "words": "pair"}
    which = request.param
    made = kinds[which]() if which in kinds else make_tokenizer(names[which])
    made.save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec("tokenizer.json", "base", "left", 0, None, None, False)
    return TextTokenizer(tmp_path / "tokenizer.json", spec)


def pieces_of(words: TextTokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(words)
    return [*(stream.push(token) for token in ids), stream.end()]


def test_random_tokens(words: TextTokenizer) -> None:
    """Any tokens, invalid bytes, special ones and unknown ones too: the pieces are the text."""
    size = words._plain.get_vocab_size()
    for seed in range(300):
        ids = np.random.default_rng(seed).integers(0, size + 2, size=30).tolist()
        assert "".join(pieces_of(words, ids)) == words.decode(ids), ids


def test_whole_characters(tmp_path: Path, make_tokenizer: Any) -> None:
    """A character of several tokens comes at once, with its last one."""
    make_tokenizer("start").save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec("tokenizer.json", "base", "left", 0, None, None, False)
    words = TextTokenizer(tmp_path / "tokenizer.json", spec)
    for text in TEXTS:
        ids = list(words.answer_ids(text))
        pieces = pieces_of(words, ids)
        assert "".join(pieces) == words.decode(ids)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
            assert sum(bool(piece) for piece in pieces) > 3


def test_bytes_are_one_run(tmp_path: Path) -> None:
    """One wrong byte spoils its whole run, so a run is held until it ends."""
    byte_fallback().save(str(tmp_path / "tokenizer.json"))
    spec = TokenizerSpec("tokenizer.json", "base", "left", 0, None, None, False)
    words = TextTokenizer(tmp_path / "tokenizer.json", spec)
    run = [3 + byte for byte in "東".encode()]
    (film,) = (i for i in range(280) if words.name(i) == "▁film")
    assert pieces_of(words, [film, *run, film]) == ["film", "", "", "", "東 film", ""]
    assert "".join(pieces_of(words, [film, *run, 3 + 0xFF, film])).count("東") == 0


@pytest.mark.parametrize(
    ("stops", "text", "kept"),
    [
        (["."], "one. two.", "one"),
        (["\n\n"], "a\nb\n\nc", "a\nb"),
        (["aab"], "aaab", "a"),
        (["abab", "bb"], "xabaabbx", "xabaa"),
        (["abcd", "bc"], "abcd", "a"),
        (["cd", "abcd"], "abcd", ""),
        (["xyz"], "xyxy", "xyxy"),
        ([], "text", "text"),
    ],
)
def test_stop_strings(stops: list[str], text: str, kept: str) -> None:
    """However the text is cut into pieces, it ends where the first complete stop begins."""
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces, start = [], 0
        for i, cut in enumerate((*cuts, True), 1):
            if cut:
                pieces.append(text[start:i])
                start = i
        stop, out, found = StopText(stops), "", False
        for piece in pieces:
            more, found = stop.push(piece)
            out += more
            if found:
                break
        assert out + ("" if found else stop.end()) == kept
        assert found == (kept != text)


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 3.0, "seed": 5},
    "a prompt of one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("which", ["lowered_t5", "lowered_llama", "writer"])
def test_equals_generate(
    which: str, options: dict[str, Any], request: pytest.FixtureRequest, sentences: Any
) -> None:
    """All pieces together are the text that `generate` returns; none is empty."""
    with Engine.load(request.getfixturevalue(which).path, ["cpu"]) as engine:
        for text in ("rain", sentences[2][:24]):
            pieces = list(engine.stream(text, **options))
            assert all(pieces)
            assert "".join(pieces) == engine.generate([text], **options)[0].text


def test_stop_strings_of_an_engine(lowered_llama: Any, sentences: Any) -> None:
    """Rows end where their own text has the string; the tokens of it are still counted."""
    texts = [sentences[0], "rain", sentences[3]]
    with Engine.load(lowered_llama.path, ["cpu"]) as engine:
        whole = engine.generate(texts, 20)
        text = whole[1].text
        stop = text[6:9]
        assert stop
        answers = engine.generate(texts, 20, stop=["no such text", stop])
        assert engine.generate(texts, 20, stop=stop, batch_size=1) == answers
        for answer, long in zip(answers, whole, strict=True):
            assert answer.text == long.text.partition(stop)[0]
            assert answer.token_ids == long.token_ids[: len(answer.token_ids)]
            assert answer.finished == (stop in long.text or long.finished)
        assert len(answers[1].token_ids) < len(whole[1].token_ids)
        assert "".join(engine.stream(texts[1], 20, stop=stop)) == answers[1].text


def test_stop_tokens(lowered_llama: Any) -> None:
    """By id instead of the manifest's, by name beside them."""
    with Engine.load(lowered_llama.path, ["cpu"]) as engine:
        (whole,) = engine.generate(["rain"], 10)
        third = whole.token_ids[2]
        cut = whole.token_ids[: whole.token_ids.index(third) + 1]
        (answer,) = engine.generate(["rain"], 10, stop_token_ids=[third])
        assert (answer.token_ids, answer.finished) == (cut, True)
        (answer,) = engine.generate(["rain"], 10, stop_token_ids=[])
        assert (answer.token_ids, answer.finished) == (whole.token_ids, False)


def test_special_token_by_name(lowered_llama: Any, tmp_path: Path) -> None:
    """No decoded text has a special token in it; its name stops all the same."""
    bundle = Path(shutil.copytree(lowered_llama.path, tmp_path / "bundle"))
    with Engine.load(bundle, ["cpu"]) as engine:
        (whole,) = engine.generate(["rain"], 10)
    file = bundle / "tokenizer.json"
    words = tokenizers.Tokenizer.from_file(str(file))
    name = str(words.id_to_token(whole.token_ids[3]))
    words.add_special_tokens([name])
    words.save(str(file))
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"]["tokenizer.json"]["size"] = file.stat().st_size
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    with Engine.load(bundle, ["cpu"]) as engine:
        (answer,) = engine.generate(["rain"], 10, stop=[name])
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert answer.token_ids[-1] == whole.token_ids[3]
        assert answer.finished


WRONG_STOPS: dict[str, tuple[dict[str, Any], str]] = {
    "an empty string": ({"stop": ["a", ""]}, "stop is ['a', '']"),
    "no string": ({"stop": [3]}, "stop is [3]"),
    "bytes": ({"stop": b"a"}, "stop is b'a'"),
    "outside the vocabulary": ({"stop_token_ids": [1, 400]}, "stop_token_ids has 400"),
    "a negative id": ({"stop_token_ids": [-1]}, "stop_token_ids has -1"),
    "true": ({"stop_token_ids": [True]}, "stop_token_ids has True"),
    "a name": ({"stop_token_ids": "</s>"}, "stop_token_ids is '</s>'"),
    "a number": ({"stop_token_ids": 1}, "stop_token_ids is 1"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_STOPS.values(), ids=WRONG_STOPS)
def test_wrong_stops(writer: Any, options: dict[str, Any], message: str) -> None:
    with Engine.load(writer.path, ["cpu"]) as engine:
        with pytest.raises(OptionError) as refusal:
            engine.generate(["rain"], **options)
        assert message in refusal.value.found
        assert engine.generate(["rain"])


def test_consumer_stops_early(lowered_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stream holds is freed with it, and no step is computed that nobody asked for."""
    begun: list[weakref.ref[Any]] = []
    steps = 0
    begin, step = decoding.begin, decoding.DecoderOnly.step

    def watched(*arguments: Any) -> Any:
        batch = begin(*arguments)
        begun.append(weakref.ref(batch))
        return batch

    def counted(self: Any, tokens: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, tokens)

    monkeypatch.setattr("eptc.runtime.engine.begin", watched)
    monkeypatch.setattr(decoding.DecoderOnly, "step", counted)
    with Engine.load(lowered_llama.path, ["cpu"]) as engine:
        expected = engine.generate(["the cat"], 30)
        steps = 0
        stream = engine.stream("rain", 30)
        first = next(stream)
        assert steps < 30
        stream.close()
        assert list(stream) == []
        gc.collect()
        assert begun[-1]() is None
        other = engine.stream("rain", 30)
        assert next(other) == first
        assert engine.generate(["the cat"], 30) == expected
        assert engine.generate(["rain"], 30)[0].text == first + "".join(other)


def test_streams_side_by_side(lowered_t5: Any, sentences: Any) -> None:
    with Engine.load(lowered_t5.path, ["cpu"]) as engine:
        texts = sentences[:3]
        streams = [engine.stream(text, 12) for text in texts]
        both = itertools.zip_longest(*streams, fillvalue="")
        found = ["".join(column) for column in zip(*both, strict=True)]
        assert found == [answer.text for answer in engine.generate(texts, 12)]


def test_refused_at_once(writer: Any, classifier: Any) -> None:
    """Not at the first piece."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        with pytest.raises(InputError, match="text 0 is 3"):
            engine.stream(3)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="text 0 has 32 tokens"):
            engine.stream("rain " * 30)
        with pytest.raises(InputError, match="do not fit the model"):
            engine.stream("rain", 31)
        with pytest.raises(TypeError, match="batch_size"):
            engine.stream("rain", batch_size=1)  # type: ignore[call-arg]
    with Engine.load(classifier.path, ["cpu"]) as engine, pytest.raises(TaskError):
        engine.stream("rain")
