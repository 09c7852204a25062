"""An engine at one shape, on the CPU: everything but the capture itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from eptc.errors import InputError, OptionError, TaskError
from eptc.runtime import Engine
from eptc.runtime.fixed_shape import fixed_shape
from eptc.runtime.manifest import load_manifest
from eptc.runtime.seal import sealed


@pytest.fixture
def engine(classifier: Any) -> Any:
    with Engine.load(classifier.path, ["cpu"]) as engine:
        yield engine


def test_smaller_batches_are_padded(engine: Engine, sentences: Any) -> None:
    """Any batch up to the shape is answered as without it, whatever came before."""
    fixed = engine.fixed(batch=4, sequence=16)
    assert repr(fixed) == "<FixedShape 4 x 16 on cpu, not captured>"
    assert not fixed.captures
    for count in (4, 1, 3, 2):
        feeds = engine.tokenize(sentences[:count], truncate=True)
        expected = engine.run(feeds)["logits"]
        found = fixed.run(feeds)["logits"]
        assert found.shape == expected.shape
        # Sums over more padding are added up in another order.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_what_is_padding_is_finite(engine: Engine) -> None:
    """A row of padding alone has a token to look at: no division by zero beside the answers."""
    fixed = engine.fixed(batch=3, sequence=8)
    fixed.run({name: np.ones((1, 2), np.int64) for name in fixed.inputs})
    assert np.isfinite(fixed.outputs["logits"].numpy()).all()
    np.testing.assert_array_equal(fixed.inputs["attention_mask"].numpy()[1:, 0], [1, 1])


def test_answers_are_copies(engine: Engine, sentences: Any) -> None:
    fixed = engine.fixed(batch=2, sequence=16)
    first = fixed.run(engine.tokenize(sentences[:2], truncate=True))["logits"]
    before = first.copy()
    fixed.run(engine.tokenize(sentences[2:4], truncate=True))
    np.testing.assert_array_equal(first, before)


@pytest.mark.skipif(
    not hasattr(onnxruntime.OrtValue, "from_dlpack"),
    reason=f"needs an ONNX Runtime that speaks DLPack; this is {onnxruntime.__version__}",
)
def test_buffers_are_written_from_outside(engine: Engine, sentences: Any) -> None:
    """Another library writes the inputs in place, and reads the outputs where they are."""
    fixed = engine.fixed(batch=2, sequence=16)
    logits = from_dlpack(fixed.outputs["logits"])
    inputs = {name: from_dlpack(array) for name, array in fixed.inputs.items()}
    for chosen in (sentences[:2], sentences[2:4]):
        feeds = engine.tokenize(chosen, truncate=True)
        expected = engine.run(feeds)["logits"]
        for name, array in feeds.items():
            inputs[name].zero_()
            inputs[name][:, : array.shape[1]] = torch.from_numpy(array)
        fixed.replay()
        np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-6)


def test_buffers_start_as_padding(engine: Engine) -> None:
    fixed = engine.fixed(batch=2, sequence=4)
    assert not fixed.inputs["input_ids"].numpy().any()
    fixed.replay()
    assert np.isfinite(fixed.outputs["logits"].numpy()).all()


def test_padding_is_the_tokenizer_s(engine: Engine) -> None:
    """Some models count positions by it."""
    tokenizer = engine.manifest.tokenizer
    assert tokenizer is not None
    padded_by = dataclasses.replace(tokenizer, pad_token_id=3)
    manifest = dataclasses.replace(engine.manifest, tokenizer=padded_by)
    fixed = fixed_shape(engine._graphs["model"], manifest, 2, 3)
    assert fixed.inputs["input_ids"].numpy().tolist() == [[3] * 3] * 2
    fixed.run({name: np.ones((1, 2), np.int64) for name in fixed.inputs})
    assert fixed.inputs["input_ids"].numpy().tolist() == [[1, 1, 3], [3, 3, 3]]
    assert fixed.inputs["token_type_ids"].numpy().tolist() == [[1, 1, 0], [0, 0, 0]]


def test_shapes_beside_one_another(engine: Engine, sentences: Any) -> None:
    shapes = [engine.fixed(1, 16), engine.fixed(2, 12), engine.fixed(2, 16)]
    feeds = engine.tokenize(sentences[:1], truncate=True)
    feeds = {name: array[:, :12] for name, array in feeds.items()}
    expected = engine.run(feeds)["logits"]
    for shape in (*shapes, *reversed(shapes)):
        np.testing.assert_allclose(shape.run(feeds)["logits"], expected, rtol=0, atol=1e-6)


def test_threads_take_turns(engine: Engine, sentences: Any) -> None:
    fixed = engine.fixed(batch=1, sequence=16)
    feeds = [engine.tokenize([text], truncate=True) for text in sentences]
    expected = [fixed.run(each)["logits"] for each in feeds]
    wrong: list[int] = []

    def ask(place: int) -> None:
        found = [fixed.run(feeds[place])["logits"] for _ in range(100)]
        wrong.extend(place for each in found if not np.array_equal(each, expected[place]))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_larger_batches_are_refused(engine: Engine, sentences: Any) -> None:
    fixed = engine.fixed(batch=2, sequence=8)
    for feeds in (
        engine.tokenize(sentences[:3], truncate=True),
        engine.tokenize(sentences[:1], truncate=True),
    ):
        with pytest.raises(InputError, match="the batch has") as refusal:
            fixed.run(feeds)
        assert "at most 2 rows of 8 tokens" in str(refusal.value)
    with pytest.raises(InputError, match="no input"):
        fixed.run({"input_ids": np.ones((1, 2), np.int64)})


WRONG = {
    "no rows": ((0, 8), "batch is 0"),
    "no tokens": ((1, 0), "sequence is 0"),
    "text": (("2", 8), "batch is '2'"),
    "more than the model takes": ((1, 17), "sequence is 17"),
}


@pytest.mark.parametrize(("shape", "message"), WRONG.values(), ids=WRONG)
def test_wrong_shapes(engine: Engine, shape: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.fixed(*shape)


def test_an_engine_that_writes(writer: Any, lowered_t5: Any) -> None:
    for path in (writer.path, lowered_t5.path):
        with Engine.load(path, ["cpu"]) as engine, pytest.raises(TaskError, match="writes text"):
            engine.fixed(1, 8)


ROUTINGS = {
    "batch": ('{"mode": "batch", "reads_padding": false', "cannot be padded"),
    "padding": ('{"mode": "per-sample", "reads_padding": true', "padding changes it"),
}


@pytest.mark.parametrize(("routing", "message"), ROUTINGS.values(), ids=ROUTINGS)
def test_answers_that_padding_changes(
    classifier: Any, tmp_path: Any, routing: str, message: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(classifier.path, folder)
    manifest = (folder / "manifest.json").read_text()
    changed = manifest.replace('"mode": "static",\n    "reads_padding": false', routing[1:])
    assert changed != manifest
    (folder / "manifest.json").write_text(json.dumps(sealed(json.loads(changed))))
    assert load_manifest(folder).routing.mode != "static"
    with Engine.load(folder, ["cpu"]) as engine, pytest.raises(OptionError, match=message):
        engine.fixed(1, 8)


def test_a_closed_engine(classifier: Any) -> None:
    engine = Engine.load(classifier.path, ["cpu"])
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.fixed(1, 8)
