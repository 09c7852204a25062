"""Label scoring: likelihoods as PyTorch computes them, the label greedy writing arrives at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptc.errors import InputError, TaskError
from eptc.runtime import MANIFEST, Engine
from eptc.runtime.scoring import Labels
from eptc.runtime.seal import sealed

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXTS = ("a good film", "rain", "the cat sleeps on the warm stone")


def labelled(lowered: Any, to: Path, labels: Sequence[str], **generation: Any) -> Path:
    """Copy an engine and give its task labels."""
    bundle = Path(shutil.copytree(lowered.path, to))
    data = json.loads((bundle / MANIFEST).read_text())
    data["task"] |= {"kind": "text-to-text", "labels": list(labels)}
    data["generation"] |= generation
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    return bundle


def likelihood(lowered: Any, feeds: Any, answer: list[int]) -> float:
    """Return the log-likelihood of tokens as one text's answer, by the PyTorch model."""
    import torch

    ids, tokens = torch.tensor(feeds["input_ids"]), torch.tensor([answer])
    with torch.no_grad():
        if lowered.model.config.is_encoder_decoder:
            start = torch.cat([torch.zeros((1, 1), dtype=torch.int64), tokens[:, :-1]], dim=1)
            logits = lowered.model(input_ids=ids, decoder_input_ids=start).logits
        else:
            whole = torch.cat([ids, tokens], dim=1)
            logits = lowered.model(input_ids=whole).logits[:, ids.shape[1] - 1 : -1]
    scores = logits.double().log_softmax(-1)[0]
    return float(scores[torch.arange(len(answer)), tokens[0]].sum())


LABELS = ("good", "good film", "bad", "warm stone, and an old tree")


@pytest.mark.parametrize("batch_size", [1, 3, 5, 32])
@pytest.mark.parametrize("which", ["lowered_t5", "lowered_llama"])
def test_probabilities(
    which: str, batch_size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Labels of different lengths, one the beginning of another, in batches that split them."""
    lowered = request.getfixturevalue(which)
    with Engine.load(labelled(lowered, tmp_path / "bundle", LABELS), ["cpu"]) as engine:
        answers = engine.classify(TEXTS, batch_size=batch_size)
        assert engine.classify([]) == []
        for text, answer in zip(TEXTS, answers, strict=True):
            feeds = engine.tokenize([text])
            encode = lowered.tokenizer.backend_tokenizer.encode
            ids = [[*encode(label, add_special_tokens=False).ids, 1] for label in LABELS]
            totals = np.array([likelihood(lowered, feeds, label) for label in ids])
            wanted = np.exp(totals - totals.max())
            # Sums of up to ten log-likelihoods, each off by some 1e-5 in float32.
            assert answer.probabilities is not None
            np.testing.assert_allclose(
                answer.probabilities, wanted / wanted.sum(), rtol=1e-3, atol=1e-12
            )
            assert sum(answer.probabilities) == pytest.approx(1, abs=1e-12)
            assert answer.label == LABELS[answer.index or 0]


def test_prefix_and_no_end(lowered_llama: Any, tmp_path: Path) -> None:
    """What training put before an answer comes first; an end it did not teach is not scored."""
    bundle = labelled(
        lowered_llama, tmp_path / "bundle", LABELS, answer_prefix=[2], answer_ends=False
    )
    with Engine.load(bundle, ["cpu"]) as engine:
        (answer,) = engine.classify(TEXTS[:1])
        encode = lowered_llama.tokenizer.backend_tokenizer.encode
        ids = [[2, *encode(label, add_special_tokens=False).ids] for label in LABELS]
        feeds = engine.tokenize(TEXTS[:1])
        totals = np.array([likelihood(lowered_llama, feeds, label) for label in ids])
        wanted = np.exp(totals - totals.max())
        assert answer.probabilities is not None
        np.testing.assert_allclose(answer.probabilities, wanted / wanted.sum(), rtol=1e-3)


STOPS = (1, 5)
SEQUENCES = st.lists(
    st.lists(st.sampled_from([0, 2, 3, 4]), min_size=1, max_size=4).map(tuple),
    min_size=2, max_size=6, unique=True,
)  # fmt: skip


@given(tokens=SEQUENCES, seed=st.integers(0, 2**32 - 1), rounded=st.booleans())
def test_agrees_with_greedy(tokens: list[tuple[int, ...]], seed: int, rounded: bool) -> None:
    """Where plain greedy writes a label's tokens and an end, that label is chosen.

    A model of six tokens, two of them ends, with any logits after any beginning, equal ones too;
    labels that begin others and labels that share their first tokens.
    """
    generator = np.random.default_rng(seed)
    after: dict[tuple[int, ...], Any] = {}

    def logits(start: tuple[int, ...]) -> Any:
        if start not in after:
            drawn = generator.normal(scale=2, size=6).astype(np.float32)
            after[start] = drawn.round() if rounded else drawn
        return after[start]

    labels = Labels([f"label {i}" for i in range(len(tokens))], tokens, STOPS, scored_end=True)
    table = np.zeros((len(labels.paths), 1 + labels.longest, 6), np.float32)
    for row, path in enumerate(labels.paths):
        for i in range(len(path) + 1):
            table[row, i] = logits(path[:i])
    answer = labels.answer(table)
    plain: tuple[int, ...] = ()
    while len(plain) <= 4 and (token := int(logits(plain).argmax())) not in STOPS:
        plain = (*plain, token)
    if plain in tokens:
        assert answer.index == tokens.index(plain)
    # And always what greedy reaches that sees labels only, one token after the other.
    bound: tuple[int, ...] = ()
    while True:
        next_tokens = {label[len(bound)] for label in tokens if label[: len(bound)] == bound
                       and len(label) > len(bound)}  # fmt: skip
        allowed = sorted(next_tokens | (set(STOPS) if bound in tokens else set()))
        best = max(allowed, key=lambda token: (logits(bound)[token], -token))
        if best in STOPS:
            break
        bound = (*bound, best)
    assert answer.index == tokens.index(bound)
    assert answer.probabilities is not None
    assert sum(answer.probabilities) == pytest.approx(1)


def test_agrees_with_what_a_trained_engine_writes(golden: Path, tmp_path: Path) -> None:
    """The recorded checkpoint writes labels; each is the one chosen."""
    import eptc

    folder = golden / "ept" / "t5-tiny"
    meta = json.loads((folder / "meta.json").read_text())
    built = eptc.export(
        folder / "adapter", base=folder / "base", task=7, tasks=meta["tasks"],
        top_k=meta["moe_top_k"], out=tmp_path / "out", verify=False,
    )  # fmt: skip
    assert built.manifest.task is not None
    labels = built.manifest.task.labels
    fields = built.manifest.task.fields
    examples = [dict.fromkeys(fields, text) for text in ("a good film", "rain", "bad , bad")]
    with built.load(providers=["cpu"]) as engine:
        plain = engine.generate(examples)
        found = engine.classify(examples)
    landed = [i for i, answer in enumerate(plain) if answer.finished and answer.text in labels]
    assert landed
    for i in landed:
        assert found[i].label == plain[i].text


def test_end_of_a_released_llama(golden: Path, tmp_path: Path) -> None:
    """Its labels were trained behind a BOS of their own and without an end."""
    import eptc

    folder = golden / "ept" / "llama-tiny"
    meta = json.loads((folder / "meta.json").read_text())
    built = eptc.export(
        folder / "adapter", base=folder / "base", task=6, tasks=meta["tasks"],
        top_k=meta["moe_top_k"], out=tmp_path / "out", verify=False,
    )  # fmt: skip
    recorded = np.load(folder / "golden" / "task6.npz")
    new = recorded["generated"][:, recorded["input_ids"].shape[1] :]
    assert (new[:, 0] == 1).all()
    assert built.manifest.generation is not None
    assert built.manifest.generation.answer_prefix == (1,)
    assert not built.manifest.generation.answer_ends
    with built.load(providers=["cpu"]) as engine:
        (answer,) = engine.classify(["a good film"])
    assert answer.label in ("negative", "positive")


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "the same tokens": (("good", " good"), {}, "are the same tokens"),
    "nothing tells them apart": (("good", "good film"), {"eos_token_id": []}, "begins another"),
}


@pytest.mark.parametrize(("labels", "generation", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_labels(
    lowered_llama: Any, tmp_path: Path, labels: Any, generation: Any, message: str
) -> None:
    """They would share one likelihood; writing still works."""
    bundle = labelled(lowered_llama, tmp_path / "bundle", labels, **generation)
    with Engine.load(bundle, ["cpu"]) as engine:
        with pytest.raises(TaskError, match=message):
            engine.classify(["rain"])
        assert engine.generate(["rain"])


def test_without_a_stop_token(lowered_llama: Any, tmp_path: Path) -> None:
    """Labels that do not begin each other need none."""
    bundle = labelled(lowered_llama, tmp_path / "bundle", ("good", "bad"), eos_token_id=[])
    with Engine.load(bundle, ["cpu"]) as engine:
        assert engine.classify(["rain"])[0].label in ("good", "bad")


def test_label_that_does_not_fit(lowered_llama: Any, tmp_path: Path) -> None:
    bundle = labelled(lowered_llama, tmp_path / "bundle", ("good", "bad " * 200))
    with Engine.load(bundle, ["cpu"]) as engine:
        with pytest.raises(InputError, match="do not fit the model"):
            engine.classify(["rain"])
        assert engine.generate(["rain"])
