"""What the reference answers: the same quantities as an engine's answers, by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc import text
from eptc.parity_gate import answers, load_reference, reference_answers
from eptc.tasks import resolve

TEXTS = ("a good film", "a bad one", "long, and very dull " * 9, "rain")


@pytest.mark.parametrize("task", ["sst2", "mnli"])
@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_labels_that_are_written(recorded: Any, tmp_path: Path, name: str, task: str) -> None:
    """Likelihoods of labels of several tokens, with an end where training taught one."""
    subject = recorded(name)
    bundle = subject.export(tmp_path / "out", task, verify=False)
    source = subject.read()
    model = load_reference(source)
    known = model.tasks[resolve(task, model.tasks)]
    tokenizer = text.find_tokenizer(source.path, source.base.path)
    assert tokenizer is not None
    lengths = {
        len(tokenizer.tokenizer.encode(label, add_special_tokens=False)) for label in known.labels
    }
    assert max(lengths) > 1 or task == "sst2"
    examples = [dict.fromkeys(known.fields, words) for words in TEXTS]
    want = reference_answers(bundle.manifest, model, known, tokenizer, examples)
    with bundle.load(providers=["cpu"]) as engine:
        got = answers(engine, examples)
    assert want.scores.shape == (len(TEXTS), len(known.labels))
    assert list(want.chosen) == list(got.chosen)
    # Sums of some log-likelihoods, each off by 1e-5 in float32.
    np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=5e-4)
    assert np.ptp(want.scores, axis=1).min() > 0.01


@pytest.mark.parametrize("task", ["tone", "same", "score"])
def test_heads(small_native: Any, tmp_path: Path, task: str) -> None:
    """Classes of texts and of pairs, and values."""
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task=task, out=tmp_path / "out", verify=False
    )
    source = eptc.checkpoint.read(small_native.ckpt, small_native.base)
    model = load_reference(source)
    known = model.tasks[resolve(task, model.tasks)]
    tokenizer = text.find_tokenizer(source.path, source.base.path)
    assert tokenizer is not None
    examples = [dict.fromkeys(known.fields, words) for words in TEXTS]
    want = reference_answers(bundle.manifest, model, known, tokenizer, examples)
    with bundle.load(providers=["cpu"]) as engine:
        got = answers(engine, examples)
    np.testing.assert_allclose(got.chosen, want.chosen, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=1e-5)
