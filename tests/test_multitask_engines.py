"""One engine for several tasks: row by row what each task's own engine answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

import eptc
from eptc import planning
from eptc.errors import BundleError, InputError, OptionError, TaskError
from eptc.parity_gate import RemoteVerifier
from eptc.runtime import Classification, Engine, TextTooLongError
from eptc.runtime.seal import sealed, unsealed
from tests.conftest import Folders

SETS = {"t5-tiny": 5e-5, "t5-gated-tiny": 1e-4, "llama-tiny": 5e-5}
TEXTS = (
    "A warm, funny and quietly moving film that stays with you for days.",
    "Fine.",
    "The committee approved the budget on Tuesday after a debate that lasted four hours.",
    "Turn off the lights in the kitchen.",
    "Nobody in the village had ever seen the river so low.",
    "Who wrote the opera that opens the season?",
)


def _folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# ---- an encoder with three heads


@pytest.fixture(scope="module")
def built(small_native: Folders, tmp_path_factory: pytest.TempPathFactory) -> eptc.Bundle:
    """All tasks of the small native checkpoint, verified."""
    out = tmp_path_factory.mktemp("all") / "all"
    return eptc.export(small_native.ckpt, base=small_native.base, task="all", out=out)


@pytest.fixture(scope="module")
def engine(built: eptc.Bundle) -> Engine:
    return built.load(providers=["cpu"], threads=1)


@pytest.fixture(scope="module")
def single(
    small_native: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Engine]:
    """Return a function that gives a task's own engine."""
    made: dict[str, Engine] = {}

    def give(task: str) -> Engine:
        if task not in made:
            out = tmp_path_factory.mktemp("single") / task
            made[task] = eptc.export(
                small_native.ckpt, base=small_native.base, task=task, out=out, verify=False
            ).load(providers=["cpu"], threads=1)
        return made[task]

    return give


@pytest.mark.parametrize("way", ["on the device", "at one shape"])
def test_rows_of_several_tasks_on_the_device(engine: Engine, way: str) -> None:
    """Rows of several tasks stay on the device too; a view of one task says what to call."""
    feeds = engine.tokenize(WORDS[:3], tasks=["tone", "score", "tone"])
    expected = engine.run(feeds)["logits"]
    if way == "on the device":
        found = engine.run_device(feeds)["logits"].numpy()
    else:
        found = engine.fixed(batch=4, sequence=24).run(feeds)["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    view = engine.for_task("tone")
    call = view.run_device if way == "on the device" else lambda _: view.fixed(4, 24)
    with pytest.raises(OptionError, match="one task of an engine of several"):
        call(feeds)


WORDS = ("the film was good", "bad", "a very long and quiet film", "not dull and not short")
ROWS: list[tuple[str, Any]] = [
    ("tone", WORDS[0]), ("score", WORDS[2]), ("same", (WORDS[1], WORDS[3])), ("tone", WORDS[1]),
    ("same", {"first": WORDS[2], "second": WORDS[2]}), ("score", {"text": WORDS[1]}),
    ("tone", WORDS[3]), ("score", WORDS[0]), ("same", [WORDS[0], WORDS[1]]),
]  # fmt: skip


def _same(got: Classification, want: Classification) -> None:
    assert (got.label, got.index) == (want.label, want.index)
    if want.value is not None:
        assert got.value == pytest.approx(want.value, abs=2e-5)
        return
    assert got.probabilities == pytest.approx(want.probabilities, abs=1e-5)


@pytest.mark.parametrize("batch_size", [32, 4, 1])
def test_each_row_is_answered_as_by_its_own_engine(
    engine: Engine, single: Callable[[str], Engine], batch_size: int
) -> None:
    """Classifications, one of pairs, and a regression, in one batch, in the caller's order."""
    tasks, texts = [task for task, _ in ROWS], [text for _, text in ROWS]
    answers = engine.classify(texts, tasks=tasks, batch_size=batch_size)
    for (task, text), got in zip(ROWS, answers, strict=True):
        _same(got, single(task).classify([text])[0])
    assert len({answer.probabilities for answer in answers}) > 5


def test_a_task_has_names(engine: Engine) -> None:
    texts = [WORDS[0]] * 5
    by_name = engine.classify(texts, tasks=["tone", "tone", "score", "tone", "score"])
    named: list[Any] = ["sentiment", 0, 2, np.int64(0), "score"]
    assert engine.classify(texts, tasks=named) == by_name
    assert engine.classify(texts, tasks=("tone",) * 5) == engine.classify(texts, tasks="tone")
    assert engine.classify([], tasks=[]) == engine.classify([], tasks="same") == []
    assert [task.name for task in engine.tasks] == ["tone", "same", "score"]
    assert engine.task is None
    assert "tasks=['tone', 'same', 'score']" in repr(engine)


@pytest.mark.parametrize("task", ["tone", "same", "score"])
def test_the_engine_of_one_of_its_tasks(
    engine: Engine, single: Callable[[str], Engine], task: str
) -> None:
    view, alone = engine.for_task(task), single(task)
    texts = [text for name, text in ROWS if name == task]
    for got, want in zip(view.classify(texts), alone.classify(texts), strict=True):
        _same(got, want)
    ours, theirs = view.manifest, alone.manifest
    assert (ours.task, ours.tasks, ours.num_labels) == (theirs.task, (), theirs.num_labels)
    assert (ours.tokenizer, ours.graphs) == (theirs.tokenizer, theirs.graphs)
    ours.check()
    feeds = view.tokenize(texts)
    logits = view.run(feeds)["logits"]
    assert logits.shape == (3, theirs.num_labels)
    np.testing.assert_allclose(logits, alone.run(feeds)["logits"], atol=2e-5)
    view.warm_up()
    view.close()
    with pytest.raises(InputError, match="closed"):
        view.classify(texts)
    assert engine.classify(texts, tasks=task)  # another's is another's


def test_arrays(engine: Engine) -> None:
    feeds = engine.tokenize([text for _, text in ROWS[:3]], tasks=["tone", "score", "same"])
    assert feeds["task_ids"].tolist() == [0, 2, 1]
    logits = engine.run(feeds)["logits"]
    assert logits.shape == (3, 2)
    assert logits[1, 1] == 0  # a head of one output, filled up
    engine.warm_up(((2, 3),))
    for wrong, words in (
        ([0, 3, 1], r"'task_ids' has 3"),
        ([0, -1, 1], r"'task_ids' has -1"),
        ([0, 1], "batch"),
        ([0.0, 1.0, 1.0], "dtype"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            engine.run({**feeds, "task_ids": np.array(wrong)})
        if "has" in words:
            assert caught.value.expected == "0 tone, 1 same, 2 score"
    del feeds["task_ids"]
    with pytest.raises(InputError, match="no input 'task_ids'"):
        engine.run(feeds)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (None, "3 tasks, and none was named"),
        ("tune", "no task 'tune': did you mean 'tone'"),
        (3, "no task 3"),
        (-1, "no task -1"),
        (["tone"], "1 tasks for 2 texts"),
        (["tone", None], "a task is None"),
        (["tone", True], "a task is True"),
        (1.5, "the tasks are 1.5"),
        ({"tone", "same"}, "the tasks are {"),  # rows would be of either, as strings hash
        ({"tone": 0, "same": 1}, "the tasks are {"),
        (np.array(1), r"the tasks are array\(1\)"),
        (b"tone", "the tasks are b'tone'"),
    ],
)
def test_wrong_tasks(engine: Engine, tasks: Any, words: str) -> None:
    for ask in (engine.classify, engine.tokenize):
        with pytest.raises(InputError, match=words):
            ask([WORDS[0], WORDS[1]], tasks=tasks)


def test_a_text_is_its_own_tasks(engine: Engine) -> None:
    with pytest.raises(TaskError, match="text 1") as caught:
        engine.classify([WORDS[0], WORDS[0]], tasks=["tone", "same"])
    assert caught.value.expected == "2 texts: first, second"


def test_an_engine_of_one_task_takes_its_name(single: Callable[[str], Engine]) -> None:
    alone = single("tone")
    assert alone.classify([WORDS[0]], tasks="sentiment") == alone.classify([WORDS[0]])
    assert alone.for_task("tone") is alone
    with pytest.raises(TaskError, match="no task 'score'"):
        alone.classify([WORDS[0]], tasks="score")
    with pytest.raises(TaskError, match="no task 1"):
        alone.for_task(1)
    with pytest.raises(InputError, match="unknown input 'task_ids'"):
        alone.run({**alone.tokenize([WORDS[0]]), "task_ids": np.array([0])})


def test_lengths_and_prompts_are_the_tasks_own(copy_native: Folders, tmp_path: Path) -> None:
    path = copy_native.ckpt / "ept_config.json"
    config = json.loads(path.read_text())
    config["tasks"][0]["max_length"] = 5
    config["tasks"][2] |= {"max_length": 8, "prompt": "the {text} was not"}
    path.write_text(json.dumps(config))
    bundle = eptc.export(copy_native.ckpt, base=copy_native.base, task="all", out=tmp_path / "all")
    alone = {
        task: eptc.export(
            copy_native.ckpt, base=copy_native.base, task=task, out=tmp_path / task, verify=False
        ).load(providers=["cpu"], threads=1)
        for task in ("tone", "score")
    }
    long = "good " * 9
    with bundle.load(providers=["cpu"], threads=1) as engine:
        feeds = engine.tokenize(
            [long, "bad", long], tasks=["tone", "tone", "score"], truncate=True
        )
        assert feeds["attention_mask"].sum(axis=1).tolist() == [5, 3, 8]
        with pytest.raises(TextTooLongError, match="text 1 has 11 tokens") as caught:
            engine.classify(["bad", long], tasks=["score", "tone"])
        assert (caught.value.position, caught.value.limit) == (1, 5)
        texts, tasks = [long, "bad film", long, "dull"], ["tone", "score", "score", "tone"]
        answers = engine.classify(texts, tasks=tasks, truncate=True)
        for text, task, got in zip(texts, tasks, answers, strict=True):
            _same(got, alone[task].classify([text], truncate=True)[0])
        for task, view in ((task, engine.for_task(task)) for task in alone):
            assert view.manifest.tokenizer == alone[task].manifest.tokenizer
            with pytest.raises(TextTooLongError):
                view.classify([long])


def test_heads_of_different_widths(copy_native: Folders, tmp_path: Path) -> None:
    """What fills up a narrow head is no label of it."""
    path = copy_native.ckpt / "ept_config.json"
    config = json.loads(path.read_text())
    config["tasks"][0]["labels"] = ["bad", "good", "odd"]
    path.write_text(json.dumps(config))
    file = copy_native.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for part in ("weight", "bias"):
        head = tensors[f"heads.tone.classifier.{part}"]
        tensors[f"heads.tone.classifier.{part}"] = np.concatenate([head, -head[:1]])
    # Both logits are below zero, which is what the third would be.
    tensors["heads.same.classifier.bias"] -= 20
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    given: dict[str, Any] = {"base": copy_native.base}
    bundle = eptc.export(copy_native.ckpt, task="all", out=tmp_path / "all", **given)
    assert bundle.manifest.num_labels == 3
    alone = eptc.export(
        copy_native.ckpt, task="same", out=tmp_path / "same", verify=False, **given
    ).load(providers=["cpu"], threads=1)
    pair = (WORDS[0], WORDS[3])
    with bundle.load(providers=["cpu"], threads=1) as engine:
        wide, narrow = engine.classify([WORDS[0], pair], tasks=["tone", "same"])
        assert wide.probabilities is not None
        assert len(wide.probabilities) == 3
        _same(narrow, alone.classify([pair])[0])
        assert engine.for_task("same").classify([pair])[0].index == narrow.index


# ---- engines that write


@pytest.fixture(scope="module", params=["t5-tiny", "llama-tiny"])
def writers(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, dict[str, Engine]]:
    """An engine of three recorded tasks, verified, and each one's own."""
    folder = golden / "ept" / request.param
    meta = json.loads((folder / "meta.json").read_text())
    given = {"base": folder / "base", "tasks": meta["tasks"], "top_k": meta["moe_top_k"]}
    place = tmp_path_factory.mktemp(request.param)
    chosen = ["stsb", "cola", "sst2"]
    together = eptc.export(folder / "adapter", task=chosen, out=place / "all", **given)
    alone = {
        task: eptc.export(
            folder / "adapter", task=task, out=place / task, verify=False, **given
        ).load(providers=["cpu"], threads=1)
        for task in chosen
    }
    return together.load(providers=["cpu"], threads=1), alone


def _asked(engine: Engine) -> tuple[list[Any], list[str]]:
    tasks = [task for _, task in zip(TEXTS, itertools.cycle(engine.tasks), strict=False)]
    return (
        [dict.fromkeys(task.fields, text) for task, text in zip(tasks, TEXTS, strict=True)],
        [task.name for task in tasks],
    )


@pytest.mark.parametrize("batch_size", [16, 2])
def test_labels_of_each_rows_task(
    writers: tuple[Engine, dict[str, Engine]], batch_size: int
) -> None:
    engine, alone = writers
    texts, tasks = _asked(engine)
    answers = engine.classify(texts, tasks=tasks, batch_size=batch_size)
    for text, task, got in zip(texts, tasks, answers, strict=True):
        _same(got, alone[task].classify([text])[0])


def test_what_each_row_writes(writers: tuple[Engine, dict[str, Engine]]) -> None:
    engine, alone = writers
    texts, tasks = _asked(engine)
    written = engine.generate(texts, tasks=tasks)
    assert [task.name for task in engine.tasks] == ["stsb", "cola", "sst2"]
    for text, task, got in zip(texts, tasks, written, strict=True):
        assert alone[task].generate([text]) == [got]
        assert "".join(engine.stream(text, task=task)) == got.text
    drawn = engine.generate(texts, 4, tasks=tasks, do_sample=True, seed=1, batch_size=2)
    assert engine.generate(texts, 4, tasks=tasks, do_sample=True, seed=1, batch_size=2) == drawn
    feeds = engine.tokenize(texts, tasks=tasks)
    assert engine.generate_ids(feeds) == [list(answer.token_ids) for answer in written]
    engine.warm_up()


def test_writers_refuse(writers: tuple[Engine, dict[str, Engine]]) -> None:
    engine, alone = writers
    with pytest.raises(TaskError, match="none was named"):
        engine.generate(["a"])
    with pytest.raises(TaskError, match="none was named"):
        engine.stream("a")
    feeds = engine.for_task("cola").tokenize(["a"])
    with pytest.raises(InputError, match="no input 'task_ids'"):
        engine.generate_ids(feeds)
    with pytest.raises(InputError, match="'task_ids' has 3"):
        engine.generate_ids({**feeds, "task_ids": np.array([3])})
    with pytest.raises(TaskError, match="no task 'mnli'"):
        alone["cola"].generate(["a"], tasks="mnli")


def _limited(engine: Engine, **limits: int) -> Engine:
    """Return an engine whose tasks write so many tokens at most, and take such texts."""
    manifest = engine.manifest
    assert manifest.generation is not None
    settings = dataclasses.replace(
        manifest.generation,
        task_max_new_tokens=tuple(limits.get(task.name, 7) for task in manifest.tasks),
    )
    found = Engine(
        engine.directory,
        dataclasses.replace(manifest, generation=settings),
        {name: engine._graph(name) for name in manifest.graphs},
        engine._text_tokenizer(),
    )
    assert found.manifest.generation is not None
    return found


def test_a_row_writes_as_much_as_its_task_may(
    writers: tuple[Engine, dict[str, Engine]],
) -> None:
    """In one batch; what the caller says holds for all."""
    engine = _limited(writers[0], stsb=1, cola=2)
    texts, tasks = _asked(engine)
    most = {"stsb": 1, "cola": 2, "sst2": 7}
    alone = {name: engine.for_task(name) for name in most}
    written = engine.generate(texts, tasks=tasks)
    feeds = engine.tokenize(texts, tasks=tasks)
    assert engine.generate_ids(feeds) == [list(answer.token_ids) for answer in written]
    for text, task, got in zip(texts, tasks, written, strict=True):
        assert len(got.token_ids) <= most[task]
        assert got == alone[task].generate([text])[0]
    assert max(len(answer.token_ids) for answer in written) > 2
    for answer in engine.generate(texts, 2, tasks=tasks):
        assert answer.finished or len(answer.token_ids) == 2


# ---- recorded outputs of the original code


def _session(bundle: eptc.Bundle, graph: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(bundle.path / f"{graph}.onnx"), options, providers=["CPUExecutionProvider"]
    )


def _run(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
    batch = len(feeds["input_ids"])
    past = {
        i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.") and i.name not in feeds
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {**feeds, **past}), strict=True))


def _stacked(arrays: Sequence[Any], *, left: bool = False) -> Any:
    """Return rows of several arrays in one, the short ones filled up with zeros."""
    width = max(array.shape[1] for array in arrays)
    return np.concatenate(
        [
            np.pad(a, ((0, 0), (width - a.shape[1], 0) if left else (0, width - a.shape[1])))
            for a in arrays
        ]
    )


@pytest.mark.parametrize("name", SETS)
def test_equals_the_original_in_one_batch(golden: Path, tmp_path: Path, name: str) -> None:
    """The recorded rows of all eight tasks at once, by plain ONNX Runtime sessions."""
    folder = golden / "ept" / name
    meta = json.loads((folder / "meta.json").read_text())
    bundle = eptc.export(
        folder / "adapter", base=folder / "base", task="all", tasks=meta["tasks"],
        top_k=meta["moe_top_k"], out=tmp_path / "all", verify=False,
    )  # fmt: skip
    wanted = [np.load(folder / "golden" / f"task{task}.npz") for task in range(8)]
    left = name == "llama-tiny"
    order = np.random.default_rng(0).permutation(sum(len(w["input_ids"]) for w in wanted))
    feeds = {
        key: _stacked([want[key] for want in wanted], left=left)[order]
        for key in ("input_ids", "attention_mask")
    }
    feeds["task_ids"] = np.repeat(np.arange(8), [len(w["input_ids"]) for w in wanted])[order]
    mask = feeds["attention_mask"]
    if left:
        feeds["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        logits = _run(_session(bundle, "model"), feeds)["logits"]
    else:
        encoded = _run(_session(bundle, "encoder"), feeds)
        decoded = _run(
            _session(bundle, "decoder"),
            {
                **{n.replace("present", "past_key_values"): v for n, v in encoded.items()
                   if "." in n},
                "input_ids": _stacked([want["decoder_input_ids"] for want in wanted])[order],
                "encoder_attention_mask": mask,
                "task_ids": feeds["task_ids"],
            },
        )  # fmt: skip
        logits = decoded["logits"]
    back, start = np.argsort(order), 0
    for want in wanted:
        rows = back[start : start + len(want["input_ids"])]
        start += len(rows)
        length = want["logits"].shape[1]
        got = logits[rows][:, -length:] if left else logits[rows][:, :length]
        valid = want["attention_mask"].astype(bool) if left else np.s_[:]
        np.testing.assert_allclose(got[valid], want["logits"][valid], rtol=0, atol=SETS[name])


# ---- the bundle


def test_order_is_the_callers(small_native: Folders, tmp_path: Path) -> None:
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task="score, sentiment", out=tmp_path / "two",
        verify=False,
    )  # fmt: skip
    manifest = bundle.manifest
    assert [task.name for task in manifest.tasks] == ["score", "tone"]
    assert (manifest.task, manifest.num_labels) == (None, 2)
    assert manifest.checkpoint["task_ids"] == [2, 0]
    assert manifest.to_json()["tasks"][1]["aliases"] == ["sentiment"]
    assert eptc.verify(bundle.path).ok
    config = json.loads((bundle.path / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    with bundle.load(providers=["cpu"]) as engine:
        assert engine.classify([WORDS[0]], tasks=[0])[0].value is not None


def test_builds_are_equal(built: eptc.Bundle, small_native: Folders, tmp_path: Path) -> None:
    again = eptc.export(
        small_native.ckpt, base=small_native.base, task=["tone", "same", "score"],
        out=tmp_path / "again",
    )  # fmt: skip
    assert _folder(again.path) == _folder(built.path)


def test_verified_in_a_process_of_its_own(
    built: eptc.Bundle, small_native: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[RemoteVerifier] = []
    start = RemoteVerifier.__init__

    def counted(self: RemoteVerifier, given: Any) -> None:
        started.append(self)
        start(self, given)

    monkeypatch.setattr(planning, "_LARGE", 0)
    monkeypatch.setattr(RemoteVerifier, "__init__", counted)
    there = eptc.export(
        small_native.ckpt, base=small_native.base, task="all", out=tmp_path / "there"
    )
    assert len(started) == 1
    assert _folder(there.path) == _folder(built.path)


def test_what_was_compared(built: eptc.Bundle) -> None:
    parity = built.manifest.parity
    assert parity["verified"]
    assert parity["passed"]
    assert list(parity["tasks"]) == ["tone", "same", "score"]
    for part in (*parity["tasks"].values(), parity["mixed"]):
        assert part["passed"]
        assert part["text_probes"] > 0
        assert part["synthetic_probes"] > 0
        assert part["rows"] > 0
    assert parity["tasks"]["tone"]["decisions"] > 0
    assert parity["tasks"]["score"]["decisions"] == 0  # it chooses nothing
    details = json.loads((built.path / "parity.json").read_text())
    names = [probe["name"] for probe in details["mixed"]["probes"]]
    assert any("texts of 3 tasks" in name for name in names)
    assert any("under each task" in name for name in names)
    assert any("tasks in turn" in name for name in names)
    assert parity["tensors"] == sum(
        part["tensors"] for part in (*parity["tasks"].values(), parity["mixed"])
    )


@pytest.mark.parametrize("precision", ["keep", "int8", "int8-weights", "int4"])
def test_lower_precision(small_native: Folders, tmp_path: Path, precision: Any) -> None:
    """The base's matrices are lowered; low ranks and heads stay."""
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task="all", precision=precision,
        out=tmp_path / "low",
    )  # fmt: skip
    parity = bundle.manifest.parity
    assert all(part["passed"] for part in (*parity["tasks"].values(), parity["mixed"]))
    if precision != "keep":
        assert parity["exact"]["mixed"]["passed"]
        plan = json.loads((bundle.path / "precision.json").read_text())
        kept = [name for name in plan["stays_float32"] if ".tasks." in name]
        assert any(name.endswith("classifier.tasks.weight") for name in kept)
        assert any(".tasks.B" in name for name in kept)
    with bundle.load(providers=["cpu"]) as engine:
        assert len(engine.classify([text for _, text in ROWS], tasks=[t for t, _ in ROWS])) == 9


def test_probes_of_ones_own(built: eptc.Bundle, small_native: Folders, tmp_path: Path) -> None:
    """Rows name their task; tasks without a row are probed with the built-in texts."""
    probe = tmp_path / "probe.jsonl"
    probe.write_text(
        '{"task": "sentiment", "text": "a good film"}\n{"task": 2, "text": "bad"}\n'
        '{"task": "tone", "text": "very dull"}\n'
    )
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task="all", probe=probe, out=tmp_path / "own"
    )
    tasks = bundle.manifest.parity["tasks"]
    assert tasks["same"] == built.manifest.parity["tasks"]["same"]
    rows = {name: part["rows"] for name, part in tasks.items()}
    assert rows["score"] < rows["tone"] < rows["same"]
    probe.write_text('{"text": "a good film"}\n')
    with pytest.raises(InputError, match="line 1: it names no task"):
        eptc.export(
            small_native.ckpt, base=small_native.base, task="all", probe=probe, out=tmp_path / "no"
        )


def test_a_bundle_of_an_earlier_version(single: Callable[[str], Engine], tmp_path: Path) -> None:
    alone = single("tone")
    old = shutil.copytree(alone.directory, tmp_path / "old")
    data = json.loads((old / "manifest.json").read_text())
    assert data["schema_version"] == 3
    data["schema_version"] = 1
    del data["tasks"]
    (old / "manifest.json").write_text(json.dumps(unsealed(data)))
    assert "is of an earlier version" in eptc.verify(old).warnings[0]
    with Engine.load(old, providers=["cpu"]) as engine:
        assert engine.classify([WORDS[0]]) == alone.classify([WORDS[0]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "tone"}, "and of tone"),
        ({"tasks": ["tone"]}, "of the tasks tone, and of none alone"),
        ({"tasks": ["tone", "tone", "score"]}, "tone, tone, score"),
        ({"tasks": None}, "reads task_ids, and there are no tasks"),
        ({"inputs": None}, "has no task_ids"),
        ({"num_labels": 3}, "the widest task has 2 outputs"),
        ({"tasks": 7}, "'tasks' is 7"),
    ],
)
def test_manifests_that_contradict_themselves(
    built: eptc.Bundle, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    bundle = shutil.copytree(built.path, tmp_path / "bundle")
    data = json.loads((bundle / "manifest.json").read_text())
    tasks = {task["name"]: task for task in data["tasks"]}
    for key, value in change.items():
        if key == "inputs":
            graph = data["graphs"]["model"]
            graph["inputs"] = [each for each in graph["inputs"] if each["name"] != "task_ids"]
        elif key == "task":
            data["task"] = tasks[value]
        elif isinstance(value, list):
            data["tasks"] = [tasks[name] for name in value]
        else:
            data[key] = value
    (bundle / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(BundleError, match=words):
        Engine.load(bundle)


@pytest.mark.parametrize("provider", ["cuda", "any"])
def test_other_providers(
    small_native: Folders, engine: Engine, tmp_path: Path, provider: Any
) -> None:
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task="all", optimize_for=provider,
        out=tmp_path / "other",
    )  # fmt: skip
    texts, tasks = [text for _, text in ROWS], [task for task, _ in ROWS]
    with bundle.load(providers=["cpu"]) as other:
        both = zip(
            other.classify(texts, tasks=tasks), engine.classify(texts, tasks=tasks), strict=True
        )
        for got, want in both:
            _same(got, want)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "tone,tone"}, "chosen twice"),
        ({"task": ["tone", "sentiment"]}, "chosen twice: as 'tone' and as 'sentiment'"),
        ({"task": "tone,nothing"}, "no task 'nothing'"),
        ({"task": ["score"]}, "'score' alone"),
        ({"task": "all", "precision": "fp16"}, "--precision fp16 is chosen by one task's text"),
        ({"task": "all", "precision": "int8-static", "calibration": "x"}, "int8-static"),
        ({"task": "all", "layout": "optimum"}, "--layout optimum"),
        ({"task": "all", "routing": "frozen"}, "--routing frozen"),
        ({"task": "all", "routing": "per-sample"}, "--routing per-sample"),
        ({"task": "all", "precision": "int8", "data": "x", "max_drop": 1.0}, "--data"),
        ({"task": "all", "precision": "auto", "data": "x", "max_drop": 1.0}, "--precision auto"),
    ],
)
def test_builds_that_are_refused(
    small_native: Folders, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        eptc.export(small_native.ckpt, base=small_native.base, out=tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


def test_routes_that_read_the_input_are_refused(
    small_routed: Folders, write_tucka: Any, small_mept: Any, tmp_path: Path
) -> None:
    for folders, words in (
        (small_routed, "routes on its input"),
        (write_tucka(), "routes on its input"),
        (small_mept(), "its prompts do"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            eptc.export(folders.ckpt, base=folders.base, task="all", out=tmp_path / "no")
        assert "export each task by itself" in str(caught.value)


def test_too_little_memory_to_verify(
    small_native: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not block by block; unverified it can be had."""
    monkeypatch.setattr("eptc.parity_gate.memory.verified_by_block", lambda *_: True)
    given: dict[str, Any] = {"base": small_native.base, "task": "all", "out": tmp_path / "x"}
    with pytest.raises(OptionError, match="verified as a whole") as caught:
        eptc.export(small_native.ckpt, **given)
    assert "--max-memory" in str(caught.value.fix)
    bundle = eptc.export(small_native.ckpt, verify=False, **given)
    assert bundle.manifest.parity == {"verified": False}


def test_a_16_bit_base_is_not_kept(copy_native: Folders, tmp_path: Path) -> None:
    """Its rounding adds up over blocks, and only whole engines of several tasks are verified."""
    path = copy_native.base / "model.safetensors"
    tensors = {
        name: tensor.astype(np.float16)
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    path.unlink()
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((copy_native.ckpt / "ept_config.json").read_text())
    config["base"]["sha256"] = None
    (copy_native.ckpt / "ept_config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {"base": copy_native.base, "task": "all", "out": tmp_path / "x"}
    with pytest.raises(OptionError, match="fp16-weights, whose rounding") as caught:
        eptc.export(copy_native.ckpt, precision="keep", **given)
    assert "--precision fp32" in str(caught.value.fix)
    bundle = eptc.export(copy_native.ckpt, precision="keep", verify=False, **given)
    assert bundle.manifest.precision == "fp16-weights"
    with bundle.load(providers=["cpu"]) as engine:
        assert engine.classify([WORDS[0]], tasks="tone")[0].label in ("bad", "good")


# ---- the command line


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    given = [
        {"task": "score", "text": WORDS[0], "label": 0.5},
        {"task": "same", "first": WORDS[1], "second": WORDS[2], "label": "no"},
        {"task": "sentiment", "text": WORDS[3], "label": "good"},
        {"task": "tone", "text": WORDS[1], "label": "bad"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def test_commands(
    cli: Callable[..., Any], built: eptc.Bundle, engine: Engine, small_native: Folders, rows: Path
) -> None:
    one = cli("run", built.path, "--task", "score", WORDS[0])
    assert float(one.stdout) == pytest.approx(
        engine.classify([WORDS[0]], tasks="score")[0].value, abs=1e-4
    )
    answers = cli("run", built.path, "--data", rows, "--json").json["answers"]
    assert answers[0]["value"] is not None
    assert [answer["label"] for answer in answers[1:]] == [
        answer.label
        for answer in engine.classify(
            [(WORDS[1], WORDS[2]), WORDS[3], WORDS[1]], tasks=["same", "tone", "tone"]
        )
    ]
    assert "names none" in cli("run", built.path, WORDS[0]).stderr
    assert cli("run", built.path, "--task", "what", WORDS[0]).code == 2
    shown = cli("inspect", built.path)
    assert "task 1 same (classification), labels no, yes" in shown.stdout
    assert "rows of several tasks in a batch" in shown.stdout
    assert cli("verify", built.path).code == 0
    bench = cli("bench", built.path, "--batch", "4", "--length", "6", "--repeat", "1", "--json")
    assert bench.json["tasks"] == ["tone", "same", "score"]
    reference = ("--reference", small_native.ckpt, "--base", small_native.base)
    found = cli("parity", built.path, *reference, "--data", rows, "--json")
    assert found.code == 0, found.stderr
    assert set(found.json["tasks"]) == set(found.json["scores"]) == {"tone", "same", "score"}
    assert found.json["scores"]["tone"]["rows"] == 2
    assert found.json["mixed"]["summary"]["passed"]


def test_the_command_that_builds(
    cli: Callable[..., Any], small_native: Folders, tmp_path: Path
) -> None:
    given = (small_native.ckpt, "--base", small_native.base, "--task", "tone,score")
    shown = cli("export", *given, "-o", tmp_path / "two", "--json")
    assert shown.code == 0, shown.stderr
    assert (shown.json["task"], shown.json["tasks"]) == (None, ["tone", "score"])
    assert shown.json["parity"]["mixed"]["passed"]
    planned, alone = (
        cli("export", small_native.ckpt, "--base", small_native.base, "--task", task,
            "--dry-run", "--json").json
        for task in ("all", "tone")
    )  # fmt: skip
    assert planned["weight_bytes"] > alone["weight_bytes"]
    size = (tmp_path / "two" / "weights.bin").stat().st_size
    assert alone["weight_bytes"] < size <= 1.1 * planned["weight_bytes"]
    refused = cli("export", *given, "-o", tmp_path / "x", "--precision", "all")
    assert refused.code == 2
    assert not (tmp_path / "x").exists()
