"""Greedy generation: token for token what transformers, or no cache at all, would write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eptc.errors import InputError, InternalError, OptionError, TaskError
from eptc.runtime import MANIFEST, Engine, decoding
from eptc.runtime.seal import sealed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BATCHES: dict[str, tuple[int, ...]] = {
    "one": (0,),
    "two": (0, 3),
    "unequal": (0, 1, 2, 3, 4),
    "twice the same": (2, 2),
}


def prompts(sentences: Sequence[str]) -> list[str]:
    """Return texts of unequal length, from one word to a whole sentence."""
    return [sentences[0], "rain", "the cat", sentences[3], "she wrote three letters"]


def reference(toy: Any, ids: Sequence[int], stops: Sequence[int], limit: int) -> list[int]:
    """Continue one prompt of the toy writer: no batch, no padding, no cache."""
    E, P, W = (toy.weights[name] for name in "EPW")
    tokens = list(ids)
    for _ in range(limit):
        states = E[tokens] * P[: len(tokens)]
        tokens.append(int(((states.sum(axis=0) + states[-1]) @ W).argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(ids) :]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_toy(writer: Any, sentences: tuple[str, ...], batch_size: int) -> None:
    """Padding, positions, mask and cache change nothing about any row."""
    texts = prompts(sentences)
    with Engine.load(writer.path, ["cpu"]) as engine:
        answers = engine.generate(texts, batch_size=batch_size)
        for text, answer in zip(texts, answers, strict=True):
            ids = engine.tokenize([text])["input_ids"][0]
            assert list(answer.token_ids) == reference(writer, ids, (1,), 6)


def test_stops(make_writer: Callable[..., Any], tmp_path: Path, sentences: Any) -> None:
    """Each stop token ends its own row, is part of the answer, and the other rows go on."""
    texts = prompts(sentences)
    (tmp_path / "free").mkdir()
    free = make_writer(tmp_path / "free", eos_token_id=())
    with Engine.load(free.path, ["cpu"]) as engine:
        whole = engine.generate(texts)
        assert all(len(answer.token_ids) == 6 and not answer.finished for answer in whole)
    stops = (whole[0].token_ids[1], whole[1].token_ids[3])
    (tmp_path / "stopped").mkdir()
    toy = make_writer(tmp_path / "stopped", eos_token_id=stops)
    with Engine.load(toy.path, ["cpu"]) as engine:
        answers = engine.generate(texts)
        for text, answer, long in zip(texts, answers, whole, strict=True):
            ids = engine.tokenize([text])["input_ids"][0]
            assert list(answer.token_ids) == reference(toy, ids, stops, 6)
            assert answer.token_ids == long.token_ids[: len(answer.token_ids)]
            assert answer.finished == (answer.token_ids[-1] in stops)
        assert len({len(answer.token_ids) for answer in answers}) > 1


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("which", ["lowered_t5", "lowered_llama"])
def test_equals_transformers(
    which: str, rows: tuple[int, ...], request: pytest.FixtureRequest, sentences: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The same tokens as `model.generate`, for every batch, with early and with late ends."""
    import torch

    lowered = request.getfixturevalue(which)
    texts = [prompts(sentences)[row] for row in rows]
    with Engine.load(lowered.path, ["cpu"]) as engine:
        free = engine.generate(texts, 8)
    # A stop token that one row writes in the middle: rows end at different steps.
    stops = [1, free[0].token_ids[2]]
    bundle = Path(shutil.copytree(lowered.path, tmp_path / "bundle"))
    data = json.loads((bundle / MANIFEST).read_text())
    data["generation"]["eos_token_id"] = stops
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    with Engine.load(bundle, ["cpu"]) as engine:
        feeds = engine.tokenize(texts)
        answers = engine.generate(texts, 8)
        assert engine.generate(texts, 8, batch_size=1) == answers
    with torch.no_grad():
        expected = lowered.model.generate(
            input_ids=torch.tensor(feeds["input_ids"]),
            attention_mask=torch.tensor(feeds["attention_mask"]),
            max_new_tokens=8, do_sample=False, num_beams=1, eos_token_id=stops, pad_token_id=0,
        )  # fmt: skip
    skip = 1 if which == "lowered_t5" else feeds["input_ids"].shape[1]
    for answer, row in zip(answers, expected[:, skip:].tolist(), strict=True):
        padding = [0] * (len(row) - len(answer.token_ids))
        assert list(answer.token_ids) + padding == row
        assert answer.text == lowered.tokenizer.decode(row, skip_special_tokens=True)
    assert len(answers[0].token_ids) <= 3


@pytest.mark.parametrize("which", ["lowered_t5", "lowered_llama"])
def test_long_answers(which: str, request: pytest.FixtureRequest, sentences: Any) -> None:
    """The cache grows over many steps, past every bucket of T5's relative positions."""
    import torch

    lowered = request.getfixturevalue(which)
    texts = prompts(sentences)[:3]
    with Engine.load(lowered.path, ["cpu"]) as engine:
        feeds = engine.tokenize(texts)
        answers = engine.generate(texts, 40)
    with torch.no_grad():
        expected = lowered.model.generate(
            input_ids=torch.tensor(feeds["input_ids"]),
            attention_mask=torch.tensor(feeds["attention_mask"]),
            max_new_tokens=40, do_sample=False, num_beams=1,
        )  # fmt: skip
    skip = 1 if which == "lowered_t5" else feeds["input_ids"].shape[1]
    for answer, row in zip(answers, expected[:, skip:].tolist(), strict=True):
        assert list(answer.token_ids) == row[: len(answer.token_ids)]
        assert set(row[len(answer.token_ids) :]) <= {0}


def test_prompt_is_applied(lowered_t5: Any) -> None:
    """A string, a pair's single text and a dict by field name are the same example."""
    with Engine.load(lowered_t5.path, ["cpu"]) as engine:
        given = engine.generate(["a good film", {"sentence": "a good film"}, ("a good film",)])
        assert given[0] == given[1] == given[2]
        feeds = engine.tokenize(["a good film"])
        assert feeds["input_ids"].tolist() == [lowered_t5.tokenizer("mood: a good film").input_ids]


def test_max_new_tokens(writer: Any) -> None:
    """The manifest's number unless another is given; the model's positions bound both."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        (short,) = engine.generate(["rain"], 2)
        (default,) = engine.generate(["rain"])
        assert len(short.token_ids) == 2
        assert default.token_ids[:2] == short.token_ids
        for wrong in (0, -1, True, 2.0, "3"):
            with pytest.raises(OptionError, match="max_new_tokens"):
                engine.generate(["rain"], wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="do not fit the model"):
            engine.generate(["rain"], 31)


def test_nan_is_no_answer(writer: Any, tmp_path: Path, rewrite: Callable[..., Path]) -> None:
    """The largest of numbers that are none would be a token like any other."""
    bundle = Path(shutil.copytree(writer.path, tmp_path / "bundle"))
    data = np.fromfile(bundle / "weights.bin", np.uint8)
    data[:] = 0xFF
    data.tofile(bundle / "weights.bin")
    with Engine.load(writer.path, ["cpu"]) as sound:
        values = {
            field.name: getattr(sound.manifest, field.name)
            for field in dataclasses.fields(sound.manifest)
            if field.name in ("generation", "tokenizer", "task", "vocab_size")
        }
    rewrite(bundle, "decoder-only", **values)
    with Engine.load(bundle, ["cpu"]) as engine, pytest.raises(InternalError, match="NaN"):
        engine.generate(["rain"])


def spoilt(toy: Any, to: Path, token: int) -> Path:
    """Copy the toy writer; whatever reads one token of it computes NaN."""
    bundle = Path(shutil.copytree(toy.path, to))
    weights = np.fromfile(bundle / "weights.bin", np.float32)
    (at,) = np.flatnonzero(weights == toy.weights["E"][token, 0])
    weights[at] = np.nan
    weights.tofile(bundle / "weights.bin")
    return bundle


def test_usable_after_nan(writer: Any, tmp_path: Path) -> None:
    """One prompt's numbers are none; the next call is answered as ever."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        expected = engine.generate(["rain"], 1)
        film, rain = (set(engine.tokenize([text])["input_ids"][0]) for text in ("film", "rain"))
    with Engine.load(
        spoilt(writer, tmp_path / "bundle", int(min(film - rain))), ["cpu"]
    ) as engine:
        for ask in (
            lambda: engine.generate(["rain", "film"], 1),
            lambda: engine.generate(["film"], 1, do_sample=True),
            lambda: list(engine.stream("film", 1)),
            lambda: engine.generate_ids(engine.tokenize(["film"]), 1),
        ):
            with pytest.raises(InternalError, match="NaN"):
                ask()
            assert engine.generate(["rain"], 1) == expected


WRONG_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"input_ids": [[5, 6]]}, "no input 'attention_mask'"),
    "more": (
        {"input_ids": [[5]], "attention_mask": [[1]], "position_ids": [[0]]},
        "unknown input 'position_ids'",
    ),
    "one row": ({"input_ids": [5, 6], "attention_mask": [1, 1]}, "has shape [2]"),
    "floats": ({"input_ids": [[5.0]], "attention_mask": [[1]]}, "has dtype float64"),
    "empty": ({"input_ids": np.zeros((0, 3), int), "attention_mask": []}, "batch is empty"),
    "different": ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "sequence is 1"),
    "outside the vocabulary": ({"input_ids": [[400]], "attention_mask": [[1]]}, "the token 400"),
    "padded on the right": ({"input_ids": [[5, 0]], "attention_mask": [[1, 0]]}, "ends with"),
    "one of two padded on the right": (
        {"input_ids": [[5, 0], [5, 6]], "attention_mask": [[1, 0], [1, 1]]}, "ends with",
    ),
    "a row of padding": (
        {"input_ids": [[5], [0]], "attention_mask": [[1], [0]]}, "a row of zeros",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("feeds", "message"), WRONG_PROMPTS.values(), ids=WRONG_PROMPTS)
def test_wrong_prompts(writer: Any, feeds: dict[str, Any], message: str) -> None:
    """Ids that fit no graph are named before one runs; the engine still works afterwards."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        with pytest.raises(InputError) as refusal:
            engine.generate_ids(feeds, 1)
        assert message in refusal.value.found
        assert engine.generate_ids({"input_ids": [[5]], "attention_mask": [[1]]}, 1)


def test_usable_after_bad_text(writer: Any) -> None:
    """Too long, no text, too many tokens asked for: an error each, and then an answer."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        expected = engine.generate(["rain"])
        calls: dict[str, Any] = {
            "text 1 has 32 tokens": lambda: engine.generate(["rain", "rain " * 30]),
            "text 0 is None": lambda: engine.generate([None]),  # type: ignore[list-item]
            "the texts are 'rain'": lambda: engine.generate("rain"),
            "do not fit the model": lambda: engine.generate(["rain"], 40),
        }
        for message, ask in calls.items():
            with pytest.raises(InputError) as refusal:
                ask()
            assert message in refusal.value.found
            assert engine.generate(["rain"]) == expected
        # An empty text has the BOS; it is a prompt like any other.
        assert engine.generate([""])[0].token_ids
        assert engine.generate(["rain " * 30], truncate=True)[0].token_ids


def test_only_the_last_logits_are_kept(writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt's logits, one position a row is copied."""
    copied: list[tuple[int, ...]] = []

    seen: list[Any] = []
    last, sound = decoding.last_logits, decoding.sound

    def given(logits: Any) -> Any:
        seen.append(logits)
        return last(logits)

    def kept(logits: Any) -> Any:
        assert not np.shares_memory(logits, seen[-1])
        copied.append(logits.shape)
        return sound(logits)

    monkeypatch.setattr(decoding, "last_logits", given)
    monkeypatch.setattr(decoding, "sound", kept)
    with Engine.load(writer.path, ["cpu"]) as engine:
        engine.generate(["rain", "the film"], 3)
    assert seen[0].shape[1] > 1
    assert copied == [(2, 400)] * 3


def test_recorded_llama(golden: Path, tmp_path: Path) -> None:
    """Two heads share a cache's head: the tokens the original wrote for texts of a batch."""
    import eptc

    folder = golden / "ept" / "llama-tiny"
    meta = json.loads((folder / "meta.json").read_text())
    built = eptc.export(
        folder / "adapter", base=folder / "base", task=6, tasks=meta["tasks"],
        top_k=meta["moe_top_k"], out=tmp_path / "out", verify=False,
    )  # fmt: skip
    want = np.load(folder / "golden" / "task6.npz")
    path = built.path / MANIFEST
    data = json.loads(path.read_text()) | {"task": None}  # plain text
    path.write_text(json.dumps(sealed(data)))
    with Engine.load(built.path, ["cpu"]) as engine:
        answers = engine.generate([str(text) for text in want["prompts"]], 10)
    new = want["generated"][:, want["input_ids"].shape[1] :]
    for answer, row in zip(answers, new.tolist(), strict=True):
        assert list(answer.token_ids) == row[: len(answer.token_ids)]
        assert set(row[len(answer.token_ids) :]) <= {2}


def test_outside_the_vocabulary(writer: Any, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has is refused before CUDA reads zeros."""
    bundle = Path(shutil.copytree(writer.path, tmp_path / "bundle"))
    data = json.loads((bundle / MANIFEST).read_text())
    data["vocab_size"] = 3
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    with (
        Engine.load(bundle, ["cpu"]) as engine,
        pytest.raises(InputError, match="ids below 3"),
    ):
        engine.generate(["rain"])


def test_classifier_writes_nothing(classifier: Any) -> None:
    with (
        Engine.load(classifier.path, ["cpu"]) as engine,
        pytest.raises(TaskError, match="call classify"),
    ):
        engine.generate(["the film"])
