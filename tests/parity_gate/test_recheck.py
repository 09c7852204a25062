"""`eptc.parity`: a published bundle against the checkpoint it was made from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc import parity_gate
from eptc.errors import BundleError, InputError, OptionError, ParityError, TaskError
from eptc.nn import GateConfig
from eptc.runtime.seal import sealed


@pytest.fixture(scope="module")
def bert(paper: Any) -> Any:
    return paper()


@pytest.fixture(scope="module")
def bundle(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tone"
    bert.export(out, "tone")
    return out


@pytest.fixture(scope="module")
def check(bert: Any) -> Callable[..., Any]:
    """Return a function that checks a bundle against its own checkpoint."""

    def check(bundle: Path, **options: Any) -> Any:
        given = {"reference": bert.ckpt, "base": bert.base, **options}
        return eptc.parity(bundle, **given)

    return check


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_passes_as_it_did_when_it_was_built(check: Any, bundle: Path) -> None:
    report = check(bundle)
    assert report.passed
    assert report.scores is None
    built = json.loads((bundle / "parity.json").read_text())
    again = report.to_json()
    for key in ("bound", "probes", "tensors", "weights", "undecided"):
        assert again[key] == built[key]


def test_another_checkpoint(check: Any, paper: Any, bundle: Path) -> None:
    other = paper(rank=2)
    with pytest.raises(BundleError, match="was made from another checkpoint") as raised:
        check(bundle, reference=other.ckpt)
    assert raised.value.exit_code == 2


def test_checkpoint_with_another_top_k(check: Any, paper: Any, bundle: Path) -> None:
    """The tensors have the same hash."""
    with pytest.raises(BundleError, match="was made with top_k 2, the checkpoint given has 3"):
        check(bundle, reference=paper(top_k=3).ckpt)


def test_another_base(check: Any, small_native: Any, bundle: Path) -> None:
    with pytest.raises(InputError) as raised:
        check(bundle, base=small_native.base)
    assert raised.value.exit_code == 2
    assert "was made from another base model" in str(raised.value)


def test_no_base(check: Any, bundle: Path) -> None:
    with pytest.raises(OptionError, match="no base model was given"):
        check(bundle, base=None)


def test_not_a_bundle(check: Any, bert: Any) -> None:
    with pytest.raises(BundleError):
        check(bert.ckpt)


def test_options_that_contradict(check: Any, bundle: Path) -> None:
    with pytest.raises(OptionError, match="--top-k 3 contradicts"):
        check(bundle, top_k=3)


def test_damaged_weight(check: Any, copy: Path) -> None:
    """One bit of one weight: the loader may take it, the gate does not."""
    data = bytearray((copy / "weights.bin").read_bytes())
    data[len(data) // 2 // 4 * 4 + 2] ^= 0x40
    (copy / "weights.bin").write_bytes(bytes(data))
    with pytest.raises(ParityError, match=r"the weight .* in the engine"):
        check(copy)


def test_missing_weights(check: Any, copy: Path) -> None:
    (copy / "weights.bin").unlink()
    with pytest.raises(BundleError):
        check(copy)


def test_truncated_weights(check: Any, copy: Path) -> None:
    data = (copy / "weights.bin").read_bytes()
    (copy / "weights.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError):
        check(copy)


def test_graph_of_another_task(check: Any, bert: Any, copy: Path, tmp_path: Path) -> None:
    bert.export(tmp_path / "care", "care")
    for name in ("model.onnx", "weights.bin"):
        shutil.copy(tmp_path / "care" / name, copy / name)
    with pytest.raises(ParityError, match="the weight"):
        check(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("max_length", 7, "longest text"), ("padding_side", "left", "pads")],
)
def test_edited_manifest(check: Any, copy: Path, key: str, value: Any, message: str) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"][key] = value
    path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ParityError, match=message):
        check(copy)


def test_unknown_task_of_the_manifest(check: Any, copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["task"]["name"] = "unheard-of"
    path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(InputError) as raised:
        check(copy)
    assert raised.value.exit_code == 2


def test_scores(check: Any, bundle: Path, tmp_path: Path) -> None:
    texts = ["a good film", "a very bad film", "long and dull", "not bad", "quiet"]
    with eptc.Engine.load(bundle, providers=["cpu"]) as engine:
        answers = [answer.label for answer in engine.classify(texts)]
    # Four labelled as the engine answers, one the other way round.
    answers[0] = {"good": "bad", "bad": "good"}[str(answers[0])]
    rows = [{"text": t, "label": a} for t, a in zip(texts, answers, strict=True)]
    report = check(bundle, data=write(tmp_path / "data.jsonl", *rows))
    error = report.scores.pop("error")
    assert 0 < error < 1e-5
    assert report.scores == {
        "rows": 5,
        "metric": "accuracy",
        "engine": 0.8,
        "reference": 0.8,
        "drop": 0.0,
        "drop_interval": [0.0, 0.0],
        "claimed": False,
        "flips": 0,
        "flips_beyond_noise": 0,
        "cosine": 1.0,
    }
    assert [p["shape"][0] for p in report.probes if not p["synthetic"]] == [1, 1, 2, 5]


def test_scores_of_text_longer_than_fits(check: Any, bundle: Path, tmp_path: Path) -> None:
    """Both sides cut it in the same place."""
    rows = [{"text": "good bad " * 300, "label": "good"}, {"text": "dull", "label": "bad"}]
    assert check(bundle, data=write(tmp_path / "data.jsonl", *rows)).scores["flips"] == 0


def test_flip_on_labelled_data(
    check: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row beyond the probes on which the engine answers otherwise, the reference being sure."""
    rows = [{"text": "good " * (i % 7 + 1), "label": "good"} for i in range(40)]
    sound = parity_gate.reference_answers

    def answers(*arguments: Any) -> Any:
        want = sound(*arguments)
        want.scores[39] *= -1
        return dataclasses.replace(want, chosen=want.scores.argmax(axis=1))

    monkeypatch.setattr("eptc.pair.reference_answers", answers)
    with pytest.raises(ParityError, match="1 of 40 labels change where the reference is sure"):
        check(bundle, data=write(tmp_path / "data.jsonl", *rows))


def test_data_that_does_not_fit(check: Any, bundle: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", {"text": "a", "label": "good"}, {"text": "b"})
    with pytest.raises(InputError, match="line 2: the label is None"):
        check(bundle, data=data)


def test_released_bundle_brings_tasks_and_top_k(recorded: Any, tmp_path: Path) -> None:
    """The folder does not store them, the manifest does."""
    llama = recorded("llama-tiny")
    llama.export(tmp_path / "out", "sst2")
    data = write(
        tmp_path / "data.jsonl",
        {"sentence": "a good film", "label": "positive"},
        {"sentence": "a bad one", "label": "negative"},
    )
    report = eptc.parity(tmp_path / "out", reference=llama.ckpt, base=llama.base, data=data)
    assert report.passed
    assert report.scores is not None
    assert report.scores["engine"] == report.scores["reference"]
    with pytest.raises(BundleError, match="was made with top_k 2, the checkpoint given has 1"):
        eptc.parity(tmp_path / "out", reference=llama.ckpt, base=llama.base, top_k=1)


def test_released_task_that_has_no_labels(recorded: Any, tmp_path: Path) -> None:
    llama = recorded("llama-tiny")
    names = ["unheard-of", *llama.options["tasks"][1:]]
    free = dataclasses.replace(llama, options={**llama.options, "tasks": names})
    free.export(tmp_path / "out", "unheard-of")
    data = write(tmp_path / "data.jsonl", {"text": "a", "label": "b"})
    with pytest.raises((OptionError, TaskError), match="no labels to score"):
        eptc.parity(tmp_path / "out", reference=llama.ckpt, base=llama.base, data=data)


def test_gate_config_of_another_native_checkpoint(check: Any, paper: Any, bundle: Path) -> None:
    """The tensors are the same, what the configuration makes of them is not."""
    other = paper(gate=GateConfig(temperature=0.25))
    with pytest.raises(ParityError, match=r"the weight .* is off at"):
        check(bundle, reference=other.ckpt)
