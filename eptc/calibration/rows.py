"""What an engine is run on while its values are observed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from eptc.examples_file import Example
from eptc.runtime import Engine, Manifest
from eptc.runtime.graph import NumpyArray
from eptc.runtime.tokenizer import TextTokenizer

__all__ = ["Row", "greedy_tokens", "play", "read_rows"]

Run = Callable[[str, Mapping[str, NumpyArray]], Mapping[str, NumpyArray]]

# Tokens that an engine writes after an example, at most: what comes later is alike.
_WRITTEN = 32
_PAST = "past_key_values."


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as an engine sees it.

    Args:
        feeds: input_ids, attention_mask[, token_type_ids], int64 [1, sequence]. No padding:
            nobody reads what an engine makes of it, and it would have a share in the statistics.
        answers: tokens that a decoder is fed behind the prompt, or behind its start token.
    """

    feeds: Mapping[str, NumpyArray]
    answers: tuple[tuple[int, ...], ...] = ()


def read_rows(
    engine: Engine, tokenizer: TextTokenizer | None, examples: Sequence[Example]
) -> Iterator[Row]:
    """Yield each example with what a decoder is fed after it.

    That is what the engine itself writes, and, where the task has labels, the example's own or
    else each label in turn. An example that is too long is cut as training did.

    Args:
        engine: the engine.
        tokenizer: the engine's.
        examples: with the task's fields and, maybe, `label`.

    Raises:
        InputError: the engine has no tokenizer, or an example without a token.
    """
    for number, example in enumerate(examples):
        feeds = engine.tokenize([example], truncate=True)
        if engine.manifest.generation is None:
            yield Row(feeds)
            continue
        prompt = _prompt(feeds)
        room = _room(engine.manifest, prompt["input_ids"].shape[1])
        # The last token written is fed to nothing.
        answers = [_written(engine, prompt, room)[:-1]]
        if label := _label(engine.manifest, example, number):
            assert tokenizer is not None
            assert engine.manifest.generation is not None
            tokens = engine.manifest.generation.answer_prefix + tokenizer.answer_ids(label)
            answers.append(tokens[:room])
        yield Row(prompt, tuple(dict.fromkeys(answers)))


def greedy_tokens(engine: Engine, example: Example) -> tuple[int, ...]:
    """Return what an engine writes after an example, cut after some tokens.

    Args:
        engine: one that writes.
        example: too long ones are cut as training did.

    Raises:
        InputError: the engine has no tokenizer, or an example without a token.
    """
    prompt = _prompt(engine.tokenize([example], truncate=True))
    return _written(engine, prompt, _room(engine.manifest, prompt["input_ids"].shape[1]))


def play(manifest: Manifest, row: Row, run: Run) -> None:
    """Run every graph of an engine on an example, decoders without a cache and with one.

    Args:
        manifest: the engine's.
        row: the example.
        run: runs a graph, by its name, on feeds; returns its outputs.
    """
    if manifest.kind == "encoder-classifier":
        run("model", row.feeds)
    elif manifest.kind == "encoder-decoder":
        _encoder_decoder(manifest, row, run)
    else:
        _decoder_only(manifest, row, run)


def _encoder_decoder(manifest: Manifest, row: Row, run: Run) -> None:
    assert manifest.generation is not None
    fixed = _past(run("encoder", row.feeds), manifest, "decoder")
    fixed["encoder_attention_mask"] = row.feeds["attention_mask"]
    start = _tokens([manifest.generation.decoder_start_token_id or 0])
    empty = _empty(manifest, "decoder", fixed)
    cache = _past(run("decoder", {"input_ids": start, **empty, **fixed}), manifest, "decoder")
    for answer in filter(None, row.answers):
        run("decoder", {"input_ids": _tokens(answer), **cache, **fixed})


def _decoder_only(manifest: Manifest, row: Row, run: Run) -> None:
    mask = row.feeds["attention_mask"]
    names = {tensor.name for tensor in manifest.graphs["model"].inputs}

    def step(
        tokens: NumpyArray, cache: Mapping[str, NumpyArray], end: int
    ) -> Mapping[str, NumpyArray]:
        positions = np.arange(end - tokens.shape[1], end)[None]
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": positions,
            **cache,
        }
        return run("model", {name: feeds[name] for name in feeds if name in names})

    end = mask.shape[1]
    outputs = step(row.feeds["input_ids"], _empty(manifest, "model", {}), end)
    cache = _past(outputs, manifest, "model")
    for answer in filter(None, row.answers):
        step(_tokens(answer), cache, end + len(answer))


def _prompt(feeds: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    return {name: feeds[name] for name in ("input_ids", "attention_mask")}


def _written(engine: Engine, prompt: Mapping[str, NumpyArray], room: int) -> tuple[int, ...]:
    return tuple(engine.generate_ids(prompt, room)[0]) if room else ()


def _room(manifest: Manifest, prompt: int) -> int:
    """Return how many tokens the engine writes after a prompt."""
    settings = manifest.generation
    assert settings is not None
    room = min(settings.max_new_tokens, _WRITTEN)
    if manifest.kind == "decoder-only" and settings.max_positions is not None:
        room = min(room, settings.max_positions - prompt)
    return max(0, room)


def _label(manifest: Manifest, example: Example, number: int) -> str:
    """Return the label that an example is continued by; empty where there are none."""
    labels = manifest.task.labels if manifest.task is not None else ()
    if not labels:
        return ""
    own = example.get("label")
    return own if own in labels else labels[number % len(labels)]


def _tokens(ids: Sequence[int]) -> NumpyArray:
    return np.array([ids], np.int64)


def _empty(
    manifest: Manifest, graph: str, given: Mapping[str, NumpyArray]
) -> dict[str, NumpyArray]:
    """Return a cache of length 0 for every past input that is not given."""
    found = {}
    for tensor in manifest.graphs[graph].inputs:
        if tensor.name.startswith(_PAST) and tensor.name not in given:
            batch, heads, _, width = tensor.shape
            assert isinstance(batch, str)
            found[tensor.name] = np.zeros((1, int(heads), 0, int(width)), np.float32)
    return found


def _past(
    outputs: Mapping[str, NumpyArray], manifest: Manifest, graph: str
) -> dict[str, NumpyArray]:
    """Return what one run puts into the cache, under the names by which the next reads it."""
    wanted = {tensor.name for tensor in manifest.graphs[graph].inputs}
    renamed = {
        _PAST + name.removeprefix("present."): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }
    return {name: value for name, value in renamed.items() if name in wanted}
