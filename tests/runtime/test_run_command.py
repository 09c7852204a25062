"""`eptc run` with an engine that writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eptc.runtime import MANIFEST, Engine
from eptc.runtime.seal import sealed

if TYPE_CHECKING:
    from collections.abc import Callable


def test_text(cli: Callable[..., Any], writer: Any) -> None:
    with Engine.load(writer.path, ["cpu"]) as engine:
        expected = engine.generate(["rain", "the film"], 4)
    texts = ("rain", "the film", "--max-new-tokens", "4")
    shown = cli("run", writer.path, *texts)
    assert (shown.code, shown.stderr) == (0, "")
    assert shown.stdout == "".join(f"{answer.text}\n" for answer in expected)
    answers = cli("run", writer.path, *texts, "--json").json["answers"]
    assert [answer["token_ids"] for answer in answers] == [
        list(answer.token_ids) for answer in expected
    ]
    streamed = cli("run", writer.path, *texts, "--stream")
    assert (streamed.code, streamed.stdout) == (0, shown.stdout)


def test_sampling(cli: Callable[..., Any], writer: Any) -> None:
    """A seed of 0 is a seed; the options reach the engine."""
    options = {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "seed": 0, "stop": ["th", "er"]}
    with Engine.load(writer.path, ["cpu"]) as engine:
        (expected,) = engine.generate(["rain"], do_sample=True, **options)  # type: ignore[arg-type]
    given = ("--sample", "--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed", "0",
             "--stop", "th", "--stop", "er")  # fmt: skip
    for _ in range(2):
        (answer,) = cli("run", writer.path, "rain", *given, "--json").json["answers"]
        assert answer["token_ids"] == list(expected.token_ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "0", "--sample"), "temperature is 0.0"),
        (("--temperature", "0.5"), "temperature is given"),
        (("--seed", "0"), "seed is given"),
        (("--top-p", "2", "--sample"), "top_p is 2.0"),
        (("--stop", ""), "stop is ('',)"),
        (("--chat",), "no chat template"),
        (("--stream", "--json"), "--stream and --json are both given"),
        (("--stream", "--max-new-tokens", "0"), "max_new_tokens is 0"),
    ],
)
def test_refused(
    cli: Callable[..., Any], writer: Any, arguments: tuple[str, ...], words: str
) -> None:
    result = cli("run", writer.path, "rain", *arguments)
    assert result.code == 2
    assert words in result.stderr


def test_labels(cli: Callable[..., Any], lowered_t5: Any) -> None:
    """A label and its own probability; an option about writing writes."""
    shown = cli("run", lowered_t5.path, "a good film")
    assert shown.code == 0
    label, likely = shown.stdout.rstrip("\n").split("\t")
    with Engine.load(lowered_t5.path, ["cpu"]) as engine:
        (answer,) = engine.classify(["a good film"])
        (text,) = engine.generate(["a good film"], 5)
    assert answer.probabilities is not None
    assert answer.index is not None
    assert (label, likely) == (answer.label, f"{answer.probabilities[answer.index]:.3f}")
    assert cli("run", lowered_t5.path, "a good film", "--max-new-tokens", "5").stdout == (
        f"{text.text}\n"
    )
    assert cli("run", lowered_t5.path, "a good film", "--stream").code == 0


def test_class_without_a_name(cli: Callable[..., Any], classifier: Any, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(classifier.path, tmp_path / "bare"))
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(sealed(data | {"task": None})))
    label, likely = cli("run", bundle, "the film").stdout.rstrip("\n").split("\t")
    assert label in "012"
    assert 0 < float(likely) <= 1
    assert "call classify" in cli("run", bundle, "the film", "--stream").stderr
