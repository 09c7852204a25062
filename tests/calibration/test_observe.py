"""Observed ranges: against every number of the values themselves."""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from eptc.calibration import Range, observe
from eptc.calibration.observe import _groups
from eptc.calibration.rows import read_rows
from eptc.errors import InputError, InternalError
from eptc.runtime import Engine
from eptc.runtime.loading import open_tokenizer

Values = Callable[[Path], dict[str, list[str]]]

TEXTS = [
    {"text": "the film was good"},
    {"text": "a very long and dull film , not good", "label": "bad"},
    {"text": "quiet"},
]
SENTENCES = [
    {"sentence": "a warm and funny film", "label": "positive"},
    {"sentence": "no plot"},
    {"sentence": "the second hour of this film is longer than the first one was"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EPTC_CACHE_DIR", str(folder))
    return folder


def numbers(bundle: Path, names: list[str]) -> list[dict[str, Any]]:
    """Return every value on every text, as further outputs of a plain session."""
    proto = onnx.load(bundle / "model.onnx")
    for index, name in enumerate(names):
        proto.graph.node.append(onnx.helper.make_node("Identity", [name], [f"copy{index}"]))
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(f"copy{index}", onnx.TensorProto.FLOAT, None)
        )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    copies = [f"copy{index}" for index in range(len(names))]
    with Engine.load(bundle) as engine:
        feeds = [engine.tokenize([text]) for text in TEXTS]
    return [dict(zip(names, session.run(copies, feed), strict=True)) for feed in feeds]


def test_smallest_and_largest(classifier: Path, all_values: Values) -> None:
    """Of every value over all texts, each alone: a text that is padded is none."""
    names = all_values(classifier)["model"]
    found = observe(classifier, TEXTS, {"model": names})["model"]
    runs = numbers(classifier, names)
    assert list(found) == names
    for name in names:
        low = min(float(run[name].min()) for run in runs)
        high = max(float(run[name].max()) for run in runs)
        assert found[name].low == pytest.approx(low, rel=1e-5, abs=1e-6), name
        assert found[name].high == pytest.approx(high, rel=1e-5, abs=1e-6), name
    mask = np.finfo(np.float32).min
    assert all(found[name].low > mask for name in names)  # no padding, so nothing is masked


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_cut_ranges_lie_inside(classifier: Path, all_values: Values, method: Any) -> None:
    """And are the same however few values are held at once."""
    values = all_values(classifier)
    whole = observe(classifier, TEXTS, values)["model"]
    cut = observe(classifier, TEXTS, values, method=method)["model"]
    assert list(cut) == list(whole)
    for name, found in cut.items():
        assert whole[name].low <= found.low <= found.high <= whole[name].high
    os.environ["EPTC_CACHE_DIR"] = ""
    assert observe(classifier, TEXTS, values, method=method, max_bytes=1)["model"] == cut


def test_some_ranges_are_cut(classifier: Path, all_values: Values) -> None:
    values = all_values(classifier)
    whole = observe(classifier, TEXTS, values)["model"]
    cut = observe(classifier, TEXTS, values, method="entropy")["model"]
    assert sum(cut[name].magnitude < whole[name].magnitude for name in cut) > len(cut) // 10


def test_decoders_read_what_they_write(writer: Path, all_values: Values) -> None:
    """Every value has a range, cache and all; logits are those of what was written."""
    values = all_values(writer)
    found = observe(writer, SENTENCES, values)
    assert {graph: list(ranges) for graph, ranges in found.items()} == values
    graph = "decoder" if "decoder" in found else "model"
    for name, past in found[graph].items():
        if name.startswith("past_key_values."):
            twin = name.replace("past_key_values.", "present.")
            made = found[graph].get(twin) or found["encoder"][twin]
            assert made.low <= past.low < past.high <= made.high
    with Engine.load(writer) as engine:
        rows = list(read_rows(engine, open_tokenizer(writer, engine.manifest), SENTENCES))
        highest = max(_highest_logit(engine, row) for row in rows)
    assert found[graph]["logits"].high == pytest.approx(highest, rel=1e-4)


def _highest_logit(engine: Engine, row: Any) -> float:
    """Return the highest logit over a row's answers, by steps of the engine itself."""
    highest = -np.inf
    for answer in row.answers:
        steps = engine._steps(dict(row.feeds), [len(answer)])
        logits = [steps.step(steps.first)]
        if answer:
            logits.append(steps.step(np.array([answer], np.int64)))
        highest = max(highest, *(float(part.max()) for part in logits))
    return highest


def test_answers_are_the_engines_own_and_labels(writer: Path) -> None:
    with Engine.load(writer) as engine:
        tokenizer = open_tokenizer(writer, engine.manifest)
        assert tokenizer is not None
        settings = engine.manifest.generation
        assert settings is not None
        rows = list(read_rows(engine, tokenizer, SENTENCES))
        for number, (row, label) in enumerate(
            zip(rows, ("positive", "positive", "negative"), strict=True)
        ):
            assert row.feeds["input_ids"].shape[0] == 1
            assert row.feeds["attention_mask"].all()
            written = engine.generate_ids(row.feeds)[0]
            assert row.answers[0] == tuple(written[:-1])
            label_ids = settings.answer_prefix + tokenizer.answer_ids(label)
            assert row.answers[-1] == label_ids[: settings.max_new_tokens], number


def test_not_finite(classifier: Path, tmp_path: Path, rewrite: Any, all_values: Values) -> None:
    """One bias that is not a number: the first value it reaches is named, and the example."""
    bias = "bert.encoder.layer.0.intermediate.dense.bias"

    def plant(graphs: Any) -> None:
        value = graphs["model"].graph.initializers[bias]
        spoilt = value.const_value.numpy().copy()
        spoilt[3] = np.nan
        value.const_value = onnx_ir.tensor(spoilt, name=bias)

    bundle = rewrite(classifier, tmp_path / "spoilt", plant)
    with pytest.raises(InputError, match=r"on example 0 the value 'bert.*intermediate.dense/Add'"):
        observe(bundle, TEXTS, all_values(bundle))


def test_unknown_value(classifier: Path) -> None:
    with pytest.raises(InternalError, match="no value 'nothing'"):
        observe(classifier, TEXTS, {"model": ["nothing"]})


def test_long_text_is_cut(classifier: Path, all_values: Values) -> None:
    values = all_values(classifier)
    assert observe(classifier, [{"text": "film " * 500}], values)["model"]["logits"].magnitude > 0


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "ranges").iterdir())


def test_cache_is_read(classifier: Path, cache: Path) -> None:
    """What is kept is what is returned; other text is another entry."""
    values = {"model": ["logits"]}
    first = observe(classifier, TEXTS, values)
    assert observe(classifier, TEXTS, values) == first
    (path,) = entries(cache)
    data = json.loads(path.read_bytes())
    data["ranges"]["model"]["logits"] = [-7.0, 8.0]
    path.write_text(json.dumps(data))
    assert observe(classifier, TEXTS, values) == {"model": {"logits": Range(-7.0, 8.0)}}
    assert observe(classifier, TEXTS[:1], values) != first
    observe(classifier, TEXTS, values, method="percentile")
    observe(classifier, TEXTS, {"model": ["bert.pooler.activation/Tanh"]})
    assert len(entries(cache)) == 4


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"[]", b'{"key": 3}', b"\xff", b'{"ranges": {"model": {"logits": [1, 0]}}}',
        b'{"ranges": {"model": {"logits": [0, NaN]}}}', b'{"ranges": {"model": {"logits": [0]}}}',
    ],
)  # fmt: skip
def test_damaged_cache(
    classifier: Path, cache: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged entry is made again, and said so."""
    values = {"model": ["logits"]}
    first = observe(classifier, TEXTS, values)
    (path,) = entries(cache)
    whole = path.read_bytes()
    if damage.startswith(b'{"ranges"'):
        damage = damage.replace(b"{", b'{"key": "' + path.stem.encode() + b'", ', 1)
    path.write_bytes(damage)
    assert observe(classifier, TEXTS, values) == first
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_two_at_once(classifier: Path, cache: Path) -> None:
    values = {"model": ["logits"]}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(observe, classifier, TEXTS, values) for _ in range(2)]
    assert runs[0].result() == runs[1].result()
    assert [path.suffix for path in entries(cache)] == [".json"]


def test_nothing_is_kept(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache cannot be written, ranges are returned all the same."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EPTC_CACHE_DIR", str(tmp_path / "file"))
    assert observe(classifier, TEXTS, {"model": ["logits"]})["model"]["logits"].magnitude > 0


def test_groups() -> None:
    """No group holds more than is allowed; what is larger is alone; the order stays."""
    sizes = {"a": 10, "b": 30, "c": 200, "d": 5, "e": 20}
    assert _groups(sizes, 200) == [["a", "b"], ["c"], ["d", "e"]]
    assert _groups(sizes, 10**6) == [list(sizes)]
