"""run: what fits a graph's interface runs, everything else is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eptc.errors import InputError
from eptc.runtime import Engine

IDS = np.array([[2, 7, 8, 3], [2, 9, 3, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
GOOD: dict[str, Any] = {
    "input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)
}  # fmt: skip

EXACT = {
    "lists": {"input_ids": IDS.tolist()},
    "int32": {"input_ids": IDS.astype(np.int32)},
    "uint8": {"input_ids": IDS.astype(np.uint8)},
    "uint64": {"input_ids": IDS.astype(np.uint64)},
    "big endian": {"input_ids": IDS.astype(">i8")},
    "bool": {"attention_mask": MASK.astype(bool)},
    "not contiguous": {"input_ids": np.asfortranarray(IDS)},
    "read only": {"input_ids": np.broadcast_to(IDS, IDS.shape)},
}


@pytest.mark.parametrize("change", EXACT.values(), ids=EXACT)
def test_exact_casts(classifier: Any, change: dict[str, Any]) -> None:
    """The same integers in another type are the same input."""
    with Engine.load(classifier.path, ["cpu"]) as engine:
        expected = engine.run(GOOD)["logits"]
        assert expected.shape == (2, 3)
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(engine.run(GOOD | change, "model")["logits"], expected)


REFUSED: dict[str, tuple[Any, str]] = {
    "no dict": ([IDS, MASK], "the feeds are a list"),
    "missing": ({"input_ids": IDS, "attention_mask": MASK}, "no input 'token_type_ids'"),
    "unknown": (GOOD | {"inputs_ids": IDS}, "unknown input 'inputs_ids'"),
    "float": (GOOD | {"input_ids": IDS.astype(float)}, "'input_ids' has dtype float64"),
    "text": (GOOD | {"input_ids": [["a"]]}, "'input_ids' has dtype"),
    "objects": (GOOD | {"input_ids": None}, "'input_ids' has dtype object"),
    "huge": (GOOD | {"input_ids": np.full((2, 4), 2**63, np.uint64)}, "has dtype uint64"),
    "ragged": (GOOD | {"input_ids": [[1, 2], [3]]}, "'input_ids' is not an array"),
    "one row": (GOOD | {"input_ids": IDS[0]}, "'input_ids' has shape [4]"),
    "rank 3": (GOOD | {"input_ids": IDS[None]}, "'input_ids' has shape [1, 2, 4]"),
    "other batch": (GOOD | {"attention_mask": MASK[:1]}, "batch is 1"),
    "other length": (GOOD | {"attention_mask": MASK[:, :3]}, "sequence is 3"),
    "empty batch": ({name: array[:0] for name, array in GOOD.items()}, "batch is empty"),
    "empty rows": ({name: array[:, :0] for name, array in GOOD.items()}, "sequence is empty"),
    "negative token": (GOOD | {"input_ids": IDS - 1}, "negative value -1"),
    "negative mask": (GOOD | {"attention_mask": -MASK}, "negative value -1"),
    "outside the vocabulary": (GOOD | {"input_ids": IDS + 5000}, "the token 5009"),
    "outside another table": (GOOD | {"token_type_ids": IDS}, "ONNX Runtime cannot run"),
}


@pytest.mark.parametrize(("feeds", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    classifier: Any, feeds: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The input is named and nothing is printed; the engine still works afterwards."""
    with Engine.load(classifier.path, ["cpu"]) as engine:
        with pytest.raises(InputError) as refusal:
            engine.run(feeds)
        assert message in refusal.value.found
        assert capfd.readouterr() == ("", "")
        engine.run(GOOD)


def test_the_vocabulary_ends(classifier: Any) -> None:
    """Its size is no token any more, on any provider: CUDA would read zeros there."""
    with Engine.load(classifier.path, ["cpu"]) as engine:
        size = engine.manifest.vocab_size
        assert size is not None
        engine.run(GOOD | {"input_ids": np.full_like(IDS, size - 1)})
        with pytest.raises(InputError, match=f"the token {size}"):
            engine.run(GOOD | {"input_ids": np.full_like(IDS, size)})


def test_graph_names(classifier: Any, lowered_t5: Any) -> None:
    """One graph needs no name; several do."""
    with (
        Engine.load(classifier.path, ["cpu"]) as engine,
        pytest.raises(InputError, match="no graph 'decoder'"),
    ):
        engine.run(GOOD, "decoder")
    with Engine.load(lowered_t5.path, ["cpu"]) as engine:
        feeds = {"input_ids": IDS, "attention_mask": MASK}
        with pytest.raises(InputError, match="several graphs"):
            engine.run(feeds)
        encoded = engine.run(feeds, "encoder")
        assert encoded["last_hidden_state"].shape == (2, 4, 32)
        past = np.zeros((2, 3, 0, 12), np.float32)
        decoder = {
            "input_ids": np.zeros((2, 1), np.int64), "encoder_attention_mask": MASK,
        }  # fmt: skip
        for i in range(2):
            for what in ("key", "value"):
                decoder[f"past_key_values.{i}.decoder.{what}"] = past
                cross = encoded[f"present.{i}.encoder.{what}"]
                decoder[f"past_key_values.{i}.encoder.{what}"] = cross
        assert engine.run(decoder, "decoder")["logits"].shape == (2, 1, 400)
        decoder["past_key_values.1.decoder.key"] = np.zeros((2, 3, 1, 12), np.float32)
        with pytest.raises(InputError, match="past_sequence is"):
            engine.run(decoder, "decoder")
        decoder["past_key_values.1.decoder.key"] = np.zeros((2, 2, 0, 12), np.float32)
        with pytest.raises(InputError, match="has shape"):
            engine.run(decoder, "decoder")


def test_mask_covers_past_and_new(writer: Any) -> None:
    """A decoder's mask that is as long as the new tokens only would be broadcast or misread."""
    feeds = {
        "input_ids": [[5]],
        "attention_mask": [[1, 1, 1]],
        "position_ids": [[2]],
        "past_key_values.0.key": np.ones((1, 1, 2, 8), np.float32),
    }
    with Engine.load(writer.path, ["cpu"]) as engine:
        assert engine.run(feeds)["logits"].shape == (1, 1, 400)
        with pytest.raises(InputError, match="covers 1 tokens") as refusal:
            engine.run(feeds | {"attention_mask": [[1]]})
        assert "2 cached + 1 new" in str(refusal.value)
        with pytest.raises(InputError, match="covers 4 tokens"):
            engine.run(feeds | {"attention_mask": [[1, 1, 1, 1]]})
        with pytest.raises(InputError, match="float64"):
            engine.run(feeds | {"past_key_values.0.key": np.ones((1, 1, 2, 8))})
