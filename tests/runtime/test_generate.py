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
from eptc.runtime import MANIFEST, Engine

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
    (bundle / MANIFEST).write_text(json.dumps(data))
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


def test_outside_the_vocabulary(writer: Any, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has is refused before CUDA reads zeros."""
    bundle = Path(shutil.copytree(writer.path, tmp_path / "bundle"))
    data = json.loads((bundle / MANIFEST).read_text())
    data["vocab_size"] = 3
    (bundle / MANIFEST).write_text(json.dumps(data))
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
