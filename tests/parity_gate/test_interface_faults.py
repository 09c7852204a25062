"""Faults in text, lengths and special tokens, and in the loop that writes an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eptc import compiled, describe
from eptc.runtime import decoding, generation
from eptc.runtime.manifest import Manifest
from eptc.text import TrainingTokenizer


@pytest.fixture
def tokenizer_file(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets another tokenizer.json be written."""

    def plant(change: Callable[[dict[str, Any]], object]) -> None:
        sound = TrainingTokenizer.write

        def write(self: TrainingTokenizer, directory: Path) -> None:
            sound(self, directory)
            path = directory / "tokenizer.json"
            data = json.loads(path.read_text("utf-8"))
            change(data)
            path.write_text(json.dumps(data), "utf-8")

        monkeypatch.setattr(TrainingTokenizer, "write", write)

    return plant


@pytest.fixture
def manifest(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets the manifest say something else."""

    def plant(change: Callable[[Manifest], Manifest]) -> None:
        sound = describe.describe

        def changed(*arguments: Any, **options: Any) -> Manifest:
            return change(sound(*arguments, **options))

        monkeypatch.setattr(compiled, "describe", changed)

    return plant


def tokenizer_spec(**changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        assert manifest.tokenizer is not None
        spec = dataclasses.replace(manifest.tokenizer, **changes)
        return dataclasses.replace(manifest, tokenizer=spec)

    return change


def generation_spec(**changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        assert manifest.generation is not None
        spec = dataclasses.replace(manifest.generation, **changes)
        return dataclasses.replace(manifest, generation=spec)

    return change


def task_spec(**changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        assert manifest.task is not None
        return dataclasses.replace(manifest, task=dataclasses.replace(manifest.task, **changes))

    return change


def lower_case(data: dict[str, Any]) -> None:
    before = data["normalizer"]
    data["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, *([before] if before else [])],
    }


def stripped(data: dict[str, Any]) -> None:
    lower_case(data)
    data["normalizer"]["normalizers"][0] = {
        "type": "Strip",
        "strip_left": True,
        "strip_right": True,
    }


def without(part: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        assert data[part] is not None
        data[part] = None

    return change


def one_type(data: dict[str, Any]) -> None:
    """Both texts of a pair have the type 0."""

    def zero(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: 0 if k == "type_id" else zero(v) for k, v in value.items()}
        return [zero(v) for v in value] if isinstance(value, list) else value

    data["post_processor"] = zero(data["post_processor"])


TOKENIZERS: dict[str, tuple[str, Any, Callable[[dict[str, Any]], object]]] = {
    "lower case": ("t5-tiny", 0, lower_case),
    "lower case on a classifier": ("bert", "tone", lower_case),
    "spaces stripped": ("llama-tiny", 0, stripped),
    "no end token": ("t5-tiny", 0, without("post_processor")),
    "no special tokens": ("bert", "tone", without("post_processor")),
    "types of a pair lost": ("bert", "same", one_type),
    "text not put together": ("t5-gated-tiny", 0, without("decoder")),
}

MANIFESTS: dict[str, tuple[str, Any, Callable[[Manifest], Manifest], str]] = {
    "cuts a token too early": ("t5-tiny", 0, tokenizer_spec(max_length=127), "longest text"),
    "never cuts": ("t5-tiny", 0, tokenizer_spec(max_length=None), "longest text"),
    "cuts at the model's limit": ("bert", "care", tokenizer_spec(max_length=200), "longest text"),
    "cuts in front": (
        "t5-tiny",
        0,
        tokenizer_spec(truncation_side="left"),
        "the engine's tokenizer differs",
    ),
    "cuts a classifier's text in front": (
        "bert",
        "same",
        tokenizer_spec(truncation_side="left"),
        "the engine's tokenizer differs",
    ),
    "types of a pair ignored": (
        "bert",
        "same",
        tokenizer_spec(pair_types=False),
        "token_type_ids of",
    ),
    "pads behind what is continued": (
        "llama-tiny",
        0,
        tokenizer_spec(padding_side="right"),
        "pads a decoder-only batch on the right",
    ),
    "pads in front of absolute positions": (
        "bert",
        "tone",
        tokenizer_spec(padding_side="left"),
        "pads a encoder-classifier batch on the left",
    ),
    "another stop token": ("t5-tiny", 0, generation_spec(eos_token_id=(2,)), "stop tokens"),
    "no stop token": ("llama-tiny", 0, generation_spec(eos_token_id=()), "stop tokens"),
    "another start token": (
        "t5-gated-tiny",
        0,
        generation_spec(decoder_start_token_id=1),
        "start token",
    ),
    "more positions than there are": (
        "llama-tiny",
        0,
        generation_spec(max_positions=4096),
        "number of positions",
    ),
    "prompt of another task": (
        "t5-tiny",
        0,
        task_spec(prompt="sst2 sentence: {sentence}"),
        "the engine's task",
    ),
    "labels in another order": ("bert", "tone", task_spec(labels=("good", "bad")), "task"),
}


@pytest.fixture
def subject(recorded: Any, paper: Any) -> Callable[[str], Any]:
    return lambda name: paper() if name == "bert" else recorded(name)


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizer(subject: Any, refused: Any, tokenizer_file: Any, what: str) -> None:
    name, task, change = TOKENIZERS[what]
    tokenizer_file(change)
    message = refused(subject(name), task)
    assert "the engine's tokenizer differs from the training tokenizer" in message


def test_types_that_training_did_not_have(
    small_native: Any, refused: Any, manifest: Any, as_subject: Any
) -> None:
    """A tokenizer that passes no types to the model trained it on zeros, in pairs too."""
    manifest(tokenizer_spec(pair_types=True))
    message = refused(as_subject(small_native.ckpt, small_native.base), "same")
    assert "token_type_ids of" in message


def test_tokenizer_of_a_task_without_a_form(
    recorded: Any, refused: Any, tokenizer_file: Any
) -> None:
    """Nothing is known of the task's prompts: its tokenizer is compared all the same."""
    t5 = recorded("t5-tiny")
    names = ["unheard-of", *t5.options["tasks"][1:]]
    t5 = dataclasses.replace(t5, options={**t5.options, "tasks": names})
    tokenizer_file(lower_case)
    assert "the engine's tokenizer differs" in refused(t5, 0)


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifest(subject: Any, refused: Any, manifest: Any, what: str) -> None:
    name, task, change, expected = MANIFESTS[what]
    manifest(change)
    assert expected in refused(subject(name), task)


# What writes answers one token after the other, and nothing else, is wrong: the tensors agree.


def second_best(logits: Any) -> Any:
    """The last step's logits with its best one gone, in the first row alone."""
    changed = np.array(logits)
    changed[0, changed[0].argmax()] = -np.inf
    return changed


def test_one_row_takes_the_second_best_token(
    recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = decoding.last_logits
    monkeypatch.setattr(decoding, "last_logits", lambda logits: second_best(sound(logits)))
    assert "decisions differ from the reference" in refused(recorded("t5-gated-tiny"), 0)


def test_cache_not_handed_on(recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop hands every layer the cache of layer 0."""
    sound = decoding._as_past

    def as_past(outputs: Any, decoder: Any) -> Any:
        cache = sound(outputs, decoder)
        return {name: cache[name.replace(".1.", ".0.")] for name in cache}

    monkeypatch.setattr(decoding, "_as_past", as_past)
    assert "decisions differ from the reference" in refused(recorded("llama-tiny"), 0)


def test_goes_on_after_the_end(
    recorded: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that ended goes on: its stop token is taken for another one."""
    sound = generation.greedy

    def greedy(steps: Any, settings: Any, limits: list[int]) -> Any:
        return [row[:-1] for row in sound(steps, settings, limits)]

    monkeypatch.setattr("eptc.runtime.engine.greedy", greedy)
    assert "decisions differ from the reference" in refused(recorded("t5-gated-tiny"), 0)


def test_engine_that_does_not_load(
    paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is published either where the fault shows before anything is compared."""
    from eptc import lower
    from eptc.errors import ParityError

    sound = lower.write

    def write(graphs: Any, directory: Path, **options: Any) -> Any:
        digests = sound(graphs, directory, **options)
        (directory / "weights.bin").write_bytes(b"")
        return digests

    monkeypatch.setattr(lower, "write", write)
    (tmp_path / "place").mkdir()
    with pytest.raises(ParityError, match="does not load"):
        paper().export(tmp_path / "place" / "out", "tone")
    assert list((tmp_path / "place").iterdir()) == []
