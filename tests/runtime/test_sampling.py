"""Sampling: transformers' distributions, the same text for the same seed in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eptc.errors import OptionError
from eptc.runtime import Engine
from eptc.runtime.sampling import Greedy, Sampler, Sampling, filtered

FILTERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 4},
    "one": {"top_k": 1},
    "some": {"top_k": 40},
    "more than there are": {"top_k": 10_000},
    "nearly none": {"top_p": 1e-6},
    "less than rounding": {"top_p": 1e-20},
    "half": {"top_p": 0.5},
    "nearly all": {"top_p": 0.999},
    "all": {"top_p": 1.0},
    "everything": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


def theirs(logits: np.ndarray[Any, Any], sampling: Sampling) -> np.ndarray[Any, Any]:
    """Filter by transformers' own classes, in the order of its `generate`."""
    import torch
    from transformers import LogitsProcessorList
    from transformers.generation import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    ids = torch.zeros((1, 1), dtype=torch.int64)
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    return np.asarray(LogitsProcessorList(warpers)(ids, scores)[0])


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_equals_transformers(options: dict[str, Any], spread: float) -> None:
    """The same tokens stay, with the same scores, over flat and over steep distributions."""
    sampling = Sampling(**options)
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(scale=spread, size=500).astype(np.float32)
        np.testing.assert_array_equal(filtered(logits, sampling), theirs(logits, sampling))


def test_equal_logits() -> None:
    """All that equal the last of the top k stay, as in transformers."""
    logits = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    for options in ({"top_k": 2}, {"top_k": 2, "top_p": 0.8}):
        sampling = Sampling(**options)
        np.testing.assert_array_equal(filtered(logits, sampling), theirs(logits, sampling))
    assert np.isfinite(filtered(logits, Sampling(top_k=2))).tolist() == [0, 1, 1, 1, 1, 0]


def test_frequencies() -> None:
    """Tokens come as often as their probabilities say; what is filtered never comes."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    counts = np.zeros(4)
    draw = Sampler(Sampling(top_k=3), 7, [0])
    for _ in range(4000):
        counts[draw(logits[None], np.array([0]))[0]] += 1
    # Standard deviations are at most sqrt(0.25 / 4000) = 0.008.
    np.testing.assert_allclose(counts / 4000, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.04)
    assert counts[3] == 0


def test_no_temperature_is_too_small() -> None:
    """The largest logit divided by it may overflow; what is left is the likeliest token."""
    logits = np.array([1000.0, 999.0, -1000.0], np.float32)
    draw = Sampler(Sampling(temperature=1e-300), 0, [0])
    assert draw(logits[None], np.array([0])).tolist() == [0]


def test_chosen_rows() -> None:
    """Rows that have ended are neither chosen for nor drawn for."""
    logits = np.eye(4, dtype=np.float32)
    assert Greedy()(logits, np.array([1, 3])).tolist() == [1, 3]
    one = Sampler(Sampling(), 3, [0, 1, 2, 3])
    other = Sampler(Sampling(), 3, [2])
    assert one(logits, np.array([2])).tolist() == other(logits[2:3], np.array([0])).tolist()


@pytest.mark.parametrize("which", ["lowered_t5", "lowered_llama"])
def test_same_seed(which: str, request: pytest.FixtureRequest, sentences: Any) -> None:
    """Text depends on seed and place in the list, not on the batch; no seed, no repetition."""
    texts = [*sentences[:3], "rain", sentences[0]]
    with Engine.load(request.getfixturevalue(which).path, ["cpu"]) as engine:
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "seed": 11}
        drawn = engine.generate(texts, 12, **options)
        assert engine.generate(texts, 12, **options, batch_size=1) == drawn
        assert engine.generate(texts, 12, **options, batch_size=2) == drawn
        assert engine.generate(texts[:1], 12, **options) == drawn[:1]
        assert "".join(engine.stream(texts[0], 12, **options)) == drawn[0].text
        # The same text in another place is drawn for anew.
        assert drawn[4].token_ids != drawn[0].token_ids
        assert engine.generate(texts, 12, **(options | {"seed": 12})) != drawn
        free = [engine.generate(texts, 12, do_sample=True, temperature=1.5) for _ in range(2)]
        assert free[0] != free[1]
        one = engine.generate(texts, 12, do_sample=True, top_k=1)
        assert one == engine.generate(texts, 12)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no temperature": ({"do_sample": True, "temperature": 0}, "temperature is 0"),
    "negative temperature": ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
    "infinite temperature": ({"do_sample": True, "temperature": float("inf")}, "temperature"),
    "NaN temperature": ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
    "text as temperature": ({"do_sample": True, "temperature": "1"}, "temperature is '1'"),
    "true as temperature": ({"do_sample": True, "temperature": True}, "temperature is True"),
    "top_k of 0": ({"do_sample": True, "top_k": 0}, "top_k is 0"),
    "half a top_k": ({"do_sample": True, "top_k": 1.5}, "top_k is 1.5"),
    "top_p of 0": ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0"),
    "top_p above 1": ({"do_sample": True, "top_p": 1.01}, "top_p is 1.01"),
    "negative seed": ({"do_sample": True, "seed": -1}, "seed is -1"),
    "half a seed": ({"do_sample": True, "seed": 0.5}, "seed is 0.5"),
    "only a temperature": ({"temperature": 0.5}, "temperature is given"),
    "only top_k": ({"top_k": 5}, "top_k is given"),
    "only top_p": ({"top_p": 0.5}, "top_p is given"),
    "only a seed": ({"seed": 0}, "seed is given"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong(writer: Any, options: dict[str, Any], message: str) -> None:
    """Refused by the call itself, streamed or not; the engine still writes afterwards."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        for ask in (lambda: engine.generate(["rain"], **options),
                    lambda: engine.stream("rain", **options)):  # fmt: skip
            with pytest.raises(OptionError) as refusal:
                ask()
            assert message in refusal.value.found
        assert engine.generate(["rain"])[0].token_ids
