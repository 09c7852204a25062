"""The training script, executed on a tiny random BERT and a few rows; its checkpoint in use."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import embed_engine
import tokenizers
import torch
import train_multitask
import transformers
from multitask.rows import Dataset, Row
from multitask.training import Settings, baseline, evaluate, schedule

import eptc
from eptc.nn import EptConfig, EptModel
from eptc.tasks import Task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINT = EXAMPLES / "minilm-multitask"
PROBE = EXAMPLES / "probe.jsonl"
WORDS = ("good", "great", "bad", "awful", "phone", "film", "food", "turn", "on", "off")


def rows(task: Task, count: int) -> tuple[Row, ...]:
    """Rows whose first word tells the label."""
    made = []
    for i in range(count):
        label = i % max(2, len(task.labels))
        value = label * 2.0 - 1 if task.kind == "regression" else float(label)
        made.append(Row(f"{WORDS[label]} {WORDS[4 + i % 6]}", value))
    return tuple(made)


TASKS = (
    Task("sentiment", "classification", labels=("no", "yes"), metric="accuracy", max_length=8),
    Task("tweets", "regression", metric="pearson", max_length=8),
    Task("spam", "classification", labels=("ham", "spam"), metric="accuracy", max_length=8),
    Task("intent", "classification", labels=("a", "b", "c"), metric="accuracy", max_length=8),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two narrow layers with a tokenizer that knows a few words."""
    folder = tmp_path_factory.mktemp("base")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: i for i, word in enumerate((*special, *WORDS))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,  # a random model must at least tell words apart
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, ...]:
    """Synthetic rows in the place of the packages' rows."""
    made = tuple(Dataset(task, rows(task, 48), rows(task, 12)) for task in TASKS)
    monkeypatch.setattr(train_multitask, "load", lambda cache: made)  # noqa: ARG005
    # The script sets the number of threads of its whole process.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # noqa: ARG005
    return made


@pytest.mark.parametrize(
    ("variant", "router_input"),
    [("paper", "task"), ("paper", "token"), ("paper", "token+task"), ("released", "task")],
)
def test_the_script_trains_scores_and_saves(
    variant: str,
    router_input: str,
    base: Path,
    datasets: tuple[Dataset, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "checkpoint"

    options = ["--output", str(output), "--base", str(base), "--steps", "12"]
    code = train_multitask.main([*options, "--variant", variant, "--router-input", router_input])

    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "step   12/12" in printed
    assert printed.count("classification") == 3
    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert [score["task"] for score in scores] == [task.name for task in TASKS]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    loaded = EptModel.load(output, base)
    assert loaded.config.gates.router_input == router_input
    again = [evaluate(loaded, tokenizer, data).score for data in datasets]
    assert again == pytest.approx([score["score"] for score in scores], rel=1e-6)


def test_two_runs_with_one_seed_are_equal_to_the_byte(
    base: Path, datasets: tuple[Dataset, ...], tmp_path: Path
) -> None:
    assert datasets
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        train_multitask.main(
            ["--output", str(tmp_path / name), "--base", str(base), "--steps", "6", "--seed", seed]
        )

    a, b, c = ((tmp_path / name / "ept_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_enough_steps_learn_the_synthetic_classes(
    base: Path, datasets: tuple[Dataset, ...], tmp_path: Path
) -> None:
    options = ["--output", str(tmp_path / "c"), "--base", str(base), "--steps", "200"]

    train_multitask.main(options)

    scores = json.loads((tmp_path / "c" / "scores.json").read_text())["scores"]
    for data, score in zip(datasets, scores, strict=True):
        if data.task.kind == "classification":
            assert score["score"] > baseline(data) + 0.3, score


def test_the_released_variant_routes_on_the_task_alone(
    base: Path, datasets: tuple[Dataset, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert datasets
    options = ["--output", str(tmp_path / "c"), "--base", str(base), "--variant", "released"]

    code = train_multitask.main([*options, "--router-input", "token"])

    assert code == 2
    assert "'released' has the gate" in capsys.readouterr().err


def test_a_base_that_is_not_there_is_an_error_with_a_fix(
    datasets: tuple[Dataset, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert datasets

    code = train_multitask.main(["--output", str(tmp_path / "c"), "--base", str(tmp_path)])

    assert code == 2
    assert "config.json" in capsys.readouterr().err


def test_a_service_embeds_the_engine_of_a_trained_task(
    base: Path,
    datasets: tuple[Dataset, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert datasets
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    train_multitask.main(["--output", str(checkpoint), "--base", str(base), "--steps", "4"])
    eptc.export(checkpoint, task="sentiment", base=base, out=bundle)
    capsys.readouterr()

    code = embed_engine.main([str(bundle), "good phone", "bad " * 40])

    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert [line.split("\t")[1] for line in lines] == ["good phone", "bad " * 40]
    assert all(line.split()[0] in ("no", "yes") for line in lines)


def test_embedding_without_a_bundle_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed_engine.main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert embed_engine.main([str(tmp_path), "text"]) == 2
    assert "error:" in capsys.readouterr().err


def test_the_schedule_gives_every_task_its_share() -> None:
    settings = Settings(steps=25, shares=(("a", 3), ("b", 1)))

    steps = schedule(("a", "b", "c"), settings)

    assert [steps.count(i) for i in range(3)] == [15, 5, 5]
    assert steps == schedule(("a", "b", "c"), settings)
    assert [sorted(steps[i : i + 5]) for i in (0, 5, 10)] == [[0, 0, 0, 1, 2]] * 3


def test_the_checkpoint_describes_itself_and_is_small() -> None:
    config = EptConfig.from_json(json.loads((CHECKPOINT / "ept_config.json").read_text()))

    assert [task.name for task in config.tasks] == ["sentiment", "tweets", "spam", "intent"]
    assert config.tasks[0].labels == ("negative", "positive")
    assert len(config.tasks[3].labels) == 42
    assert config.base.sha256 is not None
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 4 * 2**20


def test_the_checkpoint_scores_above_constant_answers() -> None:
    scores = json.loads((CHECKPOINT / "scores.json").read_text())["scores"]

    assert len(scores) == 4
    for score in scores:
        assert score["score"] > score["baseline"] + 0.2


def test_the_probe_file_has_labelled_sentences() -> None:
    entries = [json.loads(line) for line in PROBE.read_text().splitlines()]

    assert len(entries) == 20
    assert {tuple(sorted(entry)) for entry in entries} == {("label", "text")}
    assert [entry["label"] for entry in entries].count("positive") == 10
    assert {entry["label"] for entry in entries} == {"positive", "negative"}


@pytest.mark.skipif(
    importlib.util.find_spec(train_multitask.BASE_PACKAGE) is None,
    reason=f"needs {train_multitask.BASE_PACKAGE}",
)
def test_the_checkpoint_tells_clear_sentences_apart() -> None:
    base_dir = train_multitask.packaged_base()
    model = EptModel.load(CHECKPOINT, base_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_dir)
    entries = [json.loads(line) for line in PROBE.read_text().splitlines()]
    labels = model.tasks[0].labels
    data = Dataset(
        model.tasks[0],
        train=(Row("", 0),),
        held_out=tuple(Row(e["text"], labels.index(e["label"])) for e in entries),
    )

    assert evaluate(model, tokenizer, data).score >= 0.9
