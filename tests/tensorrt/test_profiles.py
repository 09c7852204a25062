"""Shapes that engines are built for: given, measured, checked, and one size for one dimension."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eptc
from eptc.errors import OptionError
from eptc.parity_gate.outputs import WRITTEN
from eptc.parity_gate.probes import Probe
from eptc.planning import Plan
from eptc.runtime.manifest import Manifest, load_manifest
from eptc.runtime.spec import GenerationSpec, GraphSpec, TensorSpec
from eptc.tensorrt.build import check_plan, fits
from eptc.tensorrt.profiles import Range, check_given, parse_profiles, profiles, ranges
from eptc.tensorrt.scripts import trtexec


def test_given() -> None:
    found = parse_profiles(["batch=1:8:32", " past_sequence = 0:16:64 "])
    assert found == {
        "batch": Range(1, 8, 32, "given"), "past_sequence": Range(0, 16, 64, "given")
    }  # fmt: skip
    assert str(found["batch"]) == "1:8:32"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["batch"], "is 'batch'"),
        (["batch=8"], "is 'batch=8'"),
        (["batch=1:2"], "is 'batch=1:2'"),
        (["batch=1:x:3"], "is 'batch=1:x:3'"),
        (["batch=4:2:8"], "MIN <= OPT <= MAX"),
        (["batch=1:9:8"], "MIN <= OPT <= MAX"),
        (["batch=0:1:2"], "sizes of 1 or more"),
        (["sequence=-1:1:2"], "sizes of 1 or more"),
        (["past_sequence=-1:1:2"], "sizes of 0 or more"),
        (["batch=1:2:3", "batch=1:2:3"], "given twice"),
    ],
)
def test_no_profile(texts: list[str], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_profiles(texts)
    assert words in str(caught.value)


NAMES = {
    "encoder-classifier": ["batch", "sequence"],
    "encoder-decoder": ["batch", "sequence", "decoder_sequence", "past_sequence"],
    "decoder-only": ["batch", "sequence", "past_sequence", "total_sequence"],
}


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("encoder-classifier", "bach=1:2:3", "did you mean 'batch'?"),
        ("encoder-classifier", "past_sequence=0:1:2", "'past_sequence'"),
        ("encoder-classifier", "sequence=1:64:129", "the model takes 128 at most"),
        ("decoder-only", "past_sequence=0:64:128", "the model takes 127 at most"),
        ("decoder-only", "total_sequence=1:2:3", "past and new tokens together"),
        ("decoder-only", "sequence=8:16:32", "answers are written with 1"),
        ("decoder-only", "past_sequence=1:16:32", "answers are written with 0"),
        ("encoder-decoder", "decoder_sequence=2:2:2", "answers are written with 1"),
        ("encoder-decoder", "encoder_sequence=2:2:2", "'encoder_sequence'"),
    ],
)
def test_outside_of_the_graph(kind: str, text: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_given(parse_profiles([text]), NAMES[kind], 128, kind)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("encoder-classifier", "sequence=8:64:128"),
        ("encoder-classifier", "batch=8:8:8"),
        ("decoder-only", "past_sequence=0:64:127"),
        ("encoder-decoder", "sequence=8:64:128"),
    ],
)
def test_within_the_graph(kind: str, text: str) -> None:
    check_given(parse_profiles([text]), NAMES[kind], 128, kind)


@pytest.fixture(scope="module")
def manifest(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of the small native checkpoint's engine."""
    out = tmp_path_factory.mktemp("engine") / "out"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out, verify=False)
    return load_manifest(out)


def decoder(manifest: Manifest, positions: int | None) -> Manifest:
    """Return the manifest of a decoder of one layer: 200 tokens of a text, 20 of an answer."""
    past = ("batch", 2, "past_sequence", 4)
    spec = GraphSpec(
        "model.onnx",
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("attention_mask", "int64", ("batch", "total_sequence")),
            TensorSpec("past_key_values.0.key", "float32", past),
        ),
        (TensorSpec("logits", "float32", ("batch", "sequence", 9)),),
    )
    generation = GenerationSpec(None, (1,), 0, 20, 1, 2, 4, positions)
    return dataclasses.replace(
        manifest, kind="decoder-only", graphs={"model": spec}, generation=generation
    )


def test_lengths_of_texts(manifest: Manifest) -> None:
    """The usual one is the median, the largest is rounded up, and never above the model's."""
    assert ranges(manifest, [9, 5, 30], {})["sequence"] == Range(1, 9, 32, "probe")
    limit = manifest.tokenizer.max_length if manifest.tokenizer else None
    assert limit is not None
    assert ranges(manifest, [limit - 1], {})["sequence"].high == limit
    assert ranges(manifest, [], {})["sequence"] == Range(1, 64, limit)
    said = parse_profiles(["sequence=2:4:8"])
    assert ranges(manifest, [30], said)["sequence"] == said["sequence"]


@pytest.mark.parametrize(("positions", "high"), [(100, 100), (4096, 512), (None, 512)])
def test_texts_that_nothing_tells_of(manifest: Manifest, positions: int | None, high: int) -> None:
    """Without texts or a tokenizer: what there are positions for, and no more than is usual."""
    of = dataclasses.replace(decoder(manifest, positions), tokenizer=None)
    most = high + 20 if positions is None else min(high + 20, positions)
    found = ranges(of, [], {})
    assert found["sequence"].high == high
    assert found["past_sequence"].high == most - 1


@given(
    lengths=st.lists(st.integers(0, 200), max_size=5),
    positions=st.none() | st.integers(201, 400),
    past=st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_sizes_agree(
    manifest: Manifest,
    lengths: list[int],
    positions: int | None,
    past: tuple[int, int] | None,
) -> None:
    """In all shapes a name is one size; the mask is as long as the past and what is new."""
    of = decoder(manifest, positions)
    said = {} if past is None else {"past_sequence": Range(0, past[0], past[0] + past[1], "given")}
    found = ranges(of, lengths, said)
    for dimension, range_ in found.items():
        assert range_.low >= (dimension != "past_sequence")
        assert range_.low <= range_.usual <= range_.high
    shapes = profiles(of.graphs, found)["model"]
    for bound in ("min", "opt", "max"):
        sizes: dict[str, set[int]] = {}
        for tensor in of.graphs["model"].inputs:
            for name, size in zip(tensor.shape, shapes[tensor.name][bound], strict=True):
                if isinstance(name, str):
                    sizes.setdefault(name, set()).add(size)
                else:
                    assert size == name
        assert all(len(each) == 1 for each in sizes.values())
        (total,), (new,), (old,) = (
            sizes[name] for name in ("total_sequence", "sequence", "past_sequence")
        )
        assert total == new + old
    # The first step has the whole text and no past, each later one a token and what was before.
    assert shapes["input_ids"]["min"][1] == 1
    assert shapes["past_key_values.0.key"]["min"][2] == 0
    if positions is not None and past is None:
        assert shapes["past_key_values.0.key"]["max"][2] < positions


def test_what_a_probe_needs(manifest: Manifest) -> None:
    """The prompt and all that is written after it; of a decoder what it is fed."""
    ids = np.ones((2, 5), np.int64)
    probe, writer = Probe("p", ids, ids), decoder(manifest, None)
    new = min(WRITTEN, 20)
    found = {
        "batch": Range(1, 1, 2), "sequence": Range(1, 1, 5 + new),
        "past_sequence": Range(0, 1, 5 + new),
    }  # fmt: skip
    assert fits(probe, writer, found)
    for name, short in (("batch", 1), ("sequence", 5), ("past_sequence", 5)):
        assert not fits(probe, writer, {**found, name: Range(0, 1, short)})
    assert not fits(probe, writer, {**found, "batch": Range(3, 3, 3)})
    translator = dataclasses.replace(writer, kind="encoder-decoder")
    found["sequence"] = Range(1, 1, 5)
    for answer, fed in ((None, new), (np.ones((2, 7), np.int64), 6)):
        own = dataclasses.replace(probe, answer=answer)
        sizes = {**found, "decoder_sequence": Range(1, 1, fed), "past_sequence": Range(0, 1, fed)}
        assert fits(own, translator, sizes)
        sizes["decoder_sequence"] = Range(1, 1, fed - 1)
        assert not fits(own, translator, sizes)


@pytest.mark.parametrize("how", ["whole model", "block by block"])
def test_a_reference_that_is_too_large(how: Any) -> None:
    plan = Plan("fp32", 1, 1, how, 1, False, 1, 1.0, None)
    if how == "whole model":
        check_plan(plan)
        return
    with pytest.raises(OptionError, match="block by block"):
        check_plan(plan)


@pytest.mark.parametrize(("version", "said"), [((10, 15), True), ((11, 0), False)])
def test_strong_types_are_asked_for(
    manifest: Manifest, version: tuple[int, int], said: bool
) -> None:
    """From TensorRT 11 on there is no other kind, and no such flag."""
    shapes = profiles(manifest.graphs, ranges(manifest, [], {}))
    assert ("--stronglyTyped" in trtexec(manifest, shapes, version)) == said


def test_prompts_before_the_text(manifest: Manifest) -> None:
    """What the encoder gives is longer than its text by them; the mask is the text's."""
    text, width = ("batch", "mask_sequence"), 4
    graphs = {
        "encoder": GraphSpec("e", (TensorSpec("input_ids", "int64", ("batch", "sequence")),), ()),
        "decoder": GraphSpec(
            "d",
            (
                TensorSpec("input_ids", "int64", ("batch", "sequence")),
                TensorSpec("encoder_attention_mask", "int64", text),
                TensorSpec("past", "float32", ("batch", 2, "past_sequence", width)),
                TensorSpec("cross", "float32", ("batch", 2, "encoder_sequence", width)),
            ),
            (),
        ),
    }
    generation = GenerationSpec(0, (1,), 0, 20, 1, 2, width)
    prompted = dataclasses.replace(
        manifest, kind="encoder-decoder", graphs=graphs, generation=generation,
        checkpoint={"prompts": {"virtual_tokens": 3}},
    )  # fmt: skip
    shapes = profiles(graphs, ranges(prompted, [], parse_profiles(["sequence=2:5:9"])))
    assert shapes["encoder"]["input_ids"] == {"min": [1, 2], "opt": [8, 5], "max": [32, 9]}
    assert shapes["decoder"]["encoder_attention_mask"] == shapes["encoder"]["input_ids"]
    assert shapes["decoder"]["cross"]["max"] == [32, 2, 12, width]
    assert shapes["decoder"]["cross"]["min"] == [1, 2, 5, width]
    assert shapes["decoder"]["input_ids"]["max"] == [32, 20]
    assert shapes["decoder"]["past"]["max"] == [32, 2, 20, width]
    names = ["batch", "sequence", "encoder_sequence"]
    with pytest.raises(OptionError, match="the text and the prompts before it"):
        check_given(parse_profiles(["encoder_sequence=1:2:3"]), names, None, prompted.kind)
