"""classify: probabilities, values and written answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eptc.errors import BundleError, InternalError, TaskError
from eptc.runtime import MANIFEST, Classification, Engine
from eptc.runtime.seal import sealed

if TYPE_CHECKING:
    from collections.abc import Callable


def edited(bundle: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    copied = Path(shutil.copytree(bundle, to))
    data = json.loads((copied / MANIFEST).read_text())
    change(data)
    (copied / MANIFEST).write_text(json.dumps(sealed(data)))
    return copied


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_toy(classifier: Any, sentences: Any, batch_size: int) -> None:
    """Order is kept whatever the batches; padding counts for nothing."""
    texts = ["the film", *(s[:20] for s in sentences), "rain", "the film"]
    with Engine.load(classifier.path, ["cpu"]) as engine:
        answers = engine.classify(texts, batch_size=batch_size)
        for text, answer in zip(texts, answers, strict=True):
            ids = engine.tokenize([text])["input_ids"][0]
            E, T, W = (classifier.weights[name] for name in "ETW")
            logits = (E[ids] + T[0]).mean(axis=0) @ W
            wanted = np.exp(logits) / np.exp(logits).sum()
            # Sums of 16 numbers of order 1 in float32, in another order.
            assert answer.probabilities is not None
            np.testing.assert_allclose(answer.probabilities, wanted, rtol=1e-5, atol=1e-6)
            assert answer.index == int(wanted.argmax())
            assert answer.label == ("negative", "neutral", "positive")[answer.index]
            assert answer.value is None
    assert answers[0] == answers[-1]


def test_no_texts(classifier: Any, writer: Any) -> None:
    """Nothing asked, nothing answered."""
    with Engine.load(classifier.path, ["cpu"]) as engine:
        assert engine.classify([]) == []
        assert engine.classify(iter(())) == []
    with Engine.load(writer.path, ["cpu"]) as engine:
        assert engine.generate([]) == []


def test_equals_transformers(lowered_bert: Any, sentences: Any) -> None:
    """Pairs of texts, padded and not: the probabilities of the Hugging Face model."""
    import torch

    pairs = [(sentences[0], "rain"), ("the cat", "the old tree"), (sentences[3], sentences[4])]
    with Engine.load(lowered_bert.path, ["cpu"]) as engine:
        answers = engine.classify(pairs)
        assert engine.classify([{"premise": a, "hypothesis": b} for a, b in pairs]) == answers
    for pair, answer in zip(pairs, answers, strict=True):
        with torch.no_grad():
            tokens = lowered_bert.tokenizer(*pair, return_tensors="pt", return_token_type_ids=True)
            logits = lowered_bert.model(**tokens).logits[0]
        # Two layers of width 32 in float32 on both sides.
        assert answer.probabilities is not None
        np.testing.assert_allclose(answer.probabilities, logits.softmax(0), rtol=1e-4, atol=1e-5)
        assert answer.label == ("yes", "no", "?")[int(logits.argmax())]


def test_large_logits(classifier: Any, tmp_path: Path, rewrite: Callable[..., Path]) -> None:
    """exp(1000) overflows float32; probabilities do not. A NaN is refused."""
    bundle = Path(shutil.copytree(classifier.path, tmp_path / "bundle"))
    with Engine.load(bundle, ["cpu"]) as engine:
        names = ("task", "num_labels", "vocab_size", "tokenizer")
        values = {name: getattr(engine.manifest, name) for name in names}
    weights = np.fromfile(bundle / "weights.bin", np.float32)
    (weights * np.float32(100)).tofile(bundle / "weights.bin")
    rewrite(bundle, "encoder-classifier", **values)
    with Engine.load(bundle, ["cpu"]) as engine:
        (answer,) = engine.classify(["the film"])
        assert answer.probabilities is not None
        assert sum(answer.probabilities) == pytest.approx(1, abs=1e-6)
        assert max(answer.probabilities) > 0.999
    np.full_like(weights, np.nan).tofile(bundle / "weights.bin")
    rewrite(bundle, "encoder-classifier", **values)
    with Engine.load(bundle, ["cpu"]) as engine, pytest.raises(InternalError, match="NaN"):
        engine.classify(["the film"])


def test_without_a_task(classifier: Any, tmp_path: Path) -> None:
    """A bare model has classes without names."""
    bundle = edited(classifier.path, tmp_path / "bare", lambda d: d.update(task=None))
    with Engine.load(bundle, ["cpu"]) as engine:
        (answer,) = engine.classify(["the film"])
        assert answer.label is None
        assert answer.index in (0, 1, 2)
        assert answer.probabilities is not None


def regression(data: dict[str, Any]) -> None:
    data["task"] = {"name": "stars", "kind": "regression"}
    data["num_labels"] = 1


def test_regression(classifier: Any, tmp_path: Path) -> None:
    """A regression's one logit is its value."""
    bundle = edited(classifier.path, tmp_path / "stars", regression)
    with Engine.load(bundle, ["cpu"]) as engine:
        logits = engine.run(engine.tokenize(["the film"]))["logits"]
        assert engine.classify(["the film"]) == [Classification(value=float(logits[0, 0]))]


def test_no_labels(writer: Any) -> None:
    with Engine.load(writer.path, ["cpu"]) as engine:
        with pytest.raises(TaskError, match="'story' has no labels") as refusal:
            engine.classify(["the film"])
        assert "generate" in str(refusal.value)


def test_another_width(classifier: Any, tmp_path: Path) -> None:
    """A graph that is not what the manifest declares does not load."""
    bundle = edited(
        classifier.path,
        tmp_path / "wide",
        lambda d: d["graphs"]["model"]["outputs"][0].update(shape=["batch", 7]),
    )
    with pytest.raises(BundleError, match="logits has shape"):
        Engine.load(bundle, ["cpu"])
