"""A pack as the runtime serves it: every task as its own bundle answers, whoever runs it."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from eptc.errors import BundleError, InputError, OptionError, TaskError
from eptc.runtime import Engine, Pack, load_manifest, read_pack, verify
from eptc.runtime.pack import open_engine
from eptc.runtime.seal import sealed
from tests.packs.conftest import TEXTS, Packed

Alone = Callable[[str], Path]


def _numbers(answers: list[Any]) -> np.ndarray[Any, Any]:
    return np.array([a.value if a.probabilities is None else a.probabilities for a in answers])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("task", ["tone", "score"])
def test_a_task_answers_as_its_own_bundle(
    built_pack: Path, alone: Alone, task: str, folded: bool
) -> None:
    with Engine.load(alone(task), providers=["cpu"]) as engine:
        want = engine.classify(TEXTS[task])
    got = Pack.load(built_pack, providers=["cpu"]).engine(task, folded=folded)
    assert got.task == engine.task
    answers = got.classify(TEXTS[task])
    assert [a.label for a in answers] == [a.label for a in want]
    np.testing.assert_allclose(_numbers(answers), _numbers(want), rtol=0, atol=3e-6)


def test_folded_graphs_are_those_of_a_bundle(built_pack: Path, alone: Alone) -> None:
    """A folded session runs the nodes that the task's own bundle runs: it costs the same."""
    import onnx

    def nodes(path: Path) -> list[str]:
        graph = onnx.load(path, load_external_data=False).graph
        return [node.op_type for node in graph.node]

    # Alone the head is folded: its transpose is a matter of how it is stored.
    mine = nodes(built_pack / "folded.model.onnx")
    assert [op for op in mine if op != "Transpose"] == [
        op for op in nodes(alone("tone") / "model.onnx") if op != "Transpose"
    ]
    assert nodes(built_pack / "model.onnx").count("MatMul") == mine.count("MatMul") + 10


@pytest.mark.parametrize("task", ["tone", "score"])
def test_plain_onnx_runtime_takes_the_adapter(built_pack: Path, alone: Alone, task: str) -> None:
    with Engine.load(alone(task), providers=["cpu"]) as engine:
        feeds = engine.tokenize(TEXTS[task])
        want = engine.run(feeds)["logits"]
    session = onnxruntime.InferenceSession(built_pack / "model.onnx")
    adapter = onnxruntime.LoraAdapter()  # kept while it is in use
    adapter.Load(str(built_pack / f"{task}.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    (got,) = session.run(None, feeds, options)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
    (base,) = session.run(None, feeds)
    assert base.shape == (len(TEXTS[task]), 0)  # the base has no head


def test_switching_loads_nothing(built_pack: Path) -> None:
    pack = Pack.load(built_pack, providers=["cpu"])
    tone, score, folded = (
        pack.engine("tone"),
        pack.engine("score"),
        pack.engine("tone", folded=True),
    )
    sessions = [engine._graphs["model"]._session for engine in (tone, score, folded)]
    assert sessions[0] is sessions[1] is not sessions[2]
    assert pack.engine("tone", folded=True)._graphs["model"]._session is sessions[2]
    other = Pack.load(built_pack, providers=["cpu"]).engine("score")
    assert other._graphs["model"]._session is sessions[0]
    tone.close()
    assert score.classify(TEXTS["score"])
    with pytest.raises(InputError, match="closed"):
        tone.classify(TEXTS["tone"])


def test_two_tasks_at_once_from_threads(built_pack: Path) -> None:
    pack = Pack.load(built_pack, providers=["cpu"])
    engines = {
        (task, folded): pack.engine(task, folded=folded)
        for task in ("tone", "score")
        for folded in (False, True)
    }
    want = {key: _numbers(engine.classify(TEXTS[key[0]])) for key, engine in engines.items()}

    def ask(number: int) -> bool:
        key = [*engines][number % 4]
        return np.array_equal(_numbers(engines[key].classify(TEXTS[key[0]])), want[key])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_threads_that_open_engines_at_once(built_pack: Path) -> None:
    pack = Pack.load(built_pack, providers=["cpu"])

    def ask(number: int) -> tuple[str, ...]:
        task = ("tone", "score")[number % 2]
        engine = pack.engine(task, folded=number % 3 == 0)
        return tuple(f"{x:.4f}" for x in _numbers(engine.classify(TEXTS[task])).ravel())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(24)))
    assert len(set(found)) == 2


def test_a_cache_serves_all_tasks(built_pack: Path, alone: Alone, tmp_path: Path) -> None:
    for _ in range(2):  # the second finds what the first kept
        pack = Pack.load(built_pack, providers=["cpu"], cache=tmp_path)
        for task in ("tone", "score"):
            with Engine.load(alone(task), providers=["cpu"]) as engine:
                want = _numbers(engine.classify(TEXTS[task]))
            got = _numbers(pack.engine(task).classify(TEXTS[task]))
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
        del pack


def test_who_has_loaded_a_pack_goes_on(packed: Packed) -> None:
    pack = Pack.load(packed.path, providers=["cpu"])
    tone = pack.engine("tone")
    before = tone.classify(TEXTS["tone"])
    (packed.path / "tone.onnx_adapter").unlink()
    assert tone.classify(TEXTS["tone"]) == before
    assert pack.engine("score").classify(TEXTS["score"])
    with pytest.raises(BundleError, match="task 'tone' was removed since the pack was loaded"):
        pack.engine("tone")
    shutil.rmtree(packed.path)
    assert tone.classify(TEXTS["tone"]) == before
    with pytest.raises(BundleError, match="was changed since it was loaded"):
        pack.engine("score", folded=True)


def test_another_base_under_a_loaded_pack_is_seen(packed: Packed) -> None:
    pack = Pack.load(packed.path, providers=["cpu"])
    weights = packed.path / "weights.bin"
    changed = bytearray(weights.read_bytes())
    changed[40_000] ^= 1
    weights.unlink()
    weights.write_bytes(changed)
    with pytest.raises(BundleError, match=r"the base of the pack .* was changed"):
        pack.engine("tone")


def test_the_file_of_another_task_is_found_out(packed: Packed) -> None:
    shutil.copy(packed.path / "score.onnx_adapter", packed.path / "tone.onnx_adapter")
    pack = Pack.load(packed.path, providers=["cpu"])
    with pytest.raises(BundleError, match="is not what the manifest lists for task 'tone'"):
        pack.engine("tone")
    assert pack.engine("score").classify(TEXTS["score"])
    (problem,) = verify(packed.path).problems
    assert problem.startswith("tone.onnx_adapter: has 33952 bytes")


def _listed_as_tone(packed: Packed, content: bytes) -> None:
    """Put another file in the place of tone's, and list it as it is."""
    import hashlib

    (packed.path / "tone.onnx_adapter").write_bytes(content)
    manifest = packed.manifest()
    manifest["tasks"]["tone"] |= {
        "size": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (packed.path / "pack.json").write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("classifier.bias"), "classifier.bias is missing"),
        (
            lambda t: t.update({"classifier.bias": t["classifier.bias"][:1]}),
            "classifier.bias is of",
        ),
        (lambda t: t.update({"other.A": t["classifier.bias"]}), "holds other.A"),
        (lambda t: t.pop(next(n for n in t if n.endswith(".A"))), "one factor of"),
        (lambda t: t.update(_swapped(t)), "have the shapes"),
        (lambda t: [t.pop(n) for n in [*t] if ".self.query." in n], "it has the ranks"),
    ],
)
def test_a_task_that_holds_something_else(
    packed: Packed, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    from eptc.packs.task import write_adapter
    from eptc.runtime.pack_tensors import read_tensors

    tensors = read_tensors(packed.path, read_pack(packed.path), "tone")
    change(tensors)
    write_adapter(packed.path / "other", tensors)
    _listed_as_tone(packed, (packed.path / "other").read_bytes())
    (packed.path / "other").unlink()
    with pytest.raises(BundleError, match=said):
        Pack.load(packed.path, providers=["cpu"]).engine("tone")
    assert any(said in problem for problem in verify(packed.path).problems)


def _swapped(tensors: dict[str, Any]) -> dict[str, Any]:
    a, b = (f"bert.encoder.layer.0.attention.self.query.{f}" for f in "AB")
    return {a: tensors[b], b: tensors[a]}


def test_a_file_that_is_no_adapter(packed: Packed) -> None:
    _listed_as_tone(packed, b"nothing of the kind")
    with pytest.raises(BundleError, match="is no adapter of ONNX Runtime"):
        Pack.load(packed.path, providers=["cpu"]).engine("tone")


def test_packs_and_bundles_are_told_apart(built_pack: Path, alone: Alone, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is a pack of several tasks") as caught:
        Engine.load(built_pack)
    assert "Pack.load" in str(caught.value)
    with pytest.raises(BundleError, match="is a pack of several tasks"):
        load_manifest(built_pack)
    with pytest.raises(BundleError, match="is a bundle of one engine") as caught:
        Pack.load(alone("tone"))
    assert "Engine.load" in str(caught.value)
    with pytest.raises(BundleError, match="is not a pack"):
        Pack.load(tmp_path)
    with pytest.raises(BundleError, match="is no folder"):
        Pack.load(tmp_path / "nowhere")


def test_a_task_is_found_by_name_or_alias(built_pack: Path, alone: Alone) -> None:
    pack = Pack.load(built_pack, providers=["cpu"])
    assert list(pack.tasks) == ["tone", "score"]
    assert pack.engine("sentiment").task == pack.tasks["tone"]
    with pytest.raises(TaskError, match="there is no task 'tonne': did you mean 'tone'"):
        pack.engine("tonne")
    with pytest.raises(TaskError, match="has 2 tasks, and none was chosen"):
        open_engine(built_pack, providers=["cpu"])
    assert open_engine(built_pack, task="score", providers=["cpu"]).task == pack.tasks["score"]
    assert open_engine(alone("tone"), task="sentiment").task == pack.tasks["tone"]
    with pytest.raises(TaskError, match="'score'"):
        open_engine(alone("tone"), task="score")
    with pytest.raises(OptionError, match="--folded was given"):
        open_engine(alone("tone"), folded=True)


def test_verify_finds_what_is_wrong(packed: Packed) -> None:
    assert verify(packed.path).ok
    assert verify(packed.path).warnings == ()
    (packed.path / "left.onnx_adapter").write_bytes(b"")
    assert verify(packed.path).warnings == ("left.onnx_adapter is not listed in the manifest",)
    graph = packed.path / "folded.model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    (problem,) = verify(packed.path).problems
    assert problem.startswith("folded.model.onnx: has SHA-256")


def test_a_linear_that_no_graph_has_an_input_for(packed: Packed) -> None:
    manifest = packed.manifest()
    manifest["linears"]["x"] = next(iter(manifest["linears"].values()))
    (packed.path / "pack.json").write_text(json.dumps(sealed(manifest)))
    assert verify(packed.path).problems == ("graph 'model': x.A is no optional input",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (lambda m: m.update(layout="heap"), "'layout' is 'heap'"),
        (lambda m: m.update(tasks={}), "has no task"),
        (lambda m: m.update(extra=1), "unknown key 'extra'"),
        (lambda m: m["tasks"]["tone"].pop("file"), "task 'tone' has no 'file'"),
        (lambda m: m["tasks"]["tone"].update(file="../x"), "not a file name"),
        (lambda m: m["files"].pop("weights.bin"), "lists no file weights.bin"),
        (lambda m: m["folded"].clear(), "has the folded graphs"),
        (lambda m: next(iter(m["linears"].values())).update(graphs=["x"]), "unknown graph 'x'"),
        (lambda m: next(iter(m["linears"].values())).update(graphs=[]), "'graphs' is"),
        (lambda m: m["heads"]["classifier.bias"].update(shape=[0]), "has the shape"),
        (lambda m: m["tasks"]["tone"].update(num_labels=5), "num_labels"),
        (lambda m: m["tasks"]["tone"].update(file="weights.bin"), "is another's too: weights.bin"),
        (lambda m: m["tasks"]["tone"].update(file="pack.json"), "pack.json"),
        (
            lambda m: m["tasks"]["tone"].update(file=m["tasks"]["score"]["file"]),
            "the file of task 'score' is another's too",
        ),
        (lambda m: m["tasks"]["tone"].update(ranks={"x": 1}), "has the ranks"),
        (lambda m: m["tasks"]["tone"].update(ranks={"8": "y"}), "has the ranks"),
        (lambda m: m["tasks"]["tone"].update(parity={}), "no 'verified'"),
        (lambda m: m["tasks"]["tone"].update(checkpoint={}), "no 'format'"),
        (lambda m: m.update(base={}), "base has no 'sha256'"),
        (lambda m: next(iter(m["linears"].values())).update(offset=10**9), "begins at byte"),
        (
            lambda m: next(iter(m["linears"].values())).update(
                offset=m["files"]["weights.bin"]["size"] - 4
            ),
            "begins at byte",
        ),
        (lambda m: m.update(weights="model.onnx"), "begins at byte"),
        (lambda m: m.update(schema_version=1), "schema version 1"),
        (lambda m: _moved(m, 4), "where that of .* ends"),
        (lambda m: _moved(m, 2), "a multiple of 4"),
    ],
)
def test_a_damaged_manifest(
    packed: Packed, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    manifest = packed.manifest()
    change(manifest)
    (packed.path / "pack.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(BundleError, match=said):
        Pack.load(packed.path)


def _moved(manifest: dict[str, Any], by: int) -> None:
    """Let the first weight begin some bytes into the next."""
    first, following, *_ = sorted(manifest["linears"].values(), key=lambda each: each["offset"])
    first["offset"] = following["offset"] + by


def _another_place(manifest: dict[str, Any]) -> None:
    """Let the last weight begin a number earlier or later, where no other linear is."""
    last = max(manifest["linears"].values(), key=lambda linear: linear["offset"])
    room = manifest["files"]["weights.bin"]["size"]
    end = last["offset"] + 4 * last["in_features"] * last["out_features"]
    last["offset"] += 4 if end + 4 <= room else -4


def _transposed(manifest: dict[str, Any]) -> None:
    linears = manifest["linears"].values()
    square = next(each for each in linears if each["in_features"] == each["out_features"])
    square["transposed"] = not square["transposed"]


@pytest.mark.parametrize(
    "change",
    [
        _another_place,
        _transposed,
        lambda m: m["tasks"]["tone"]["task"]["labels"].reverse(),
        lambda m: m.pop("manifest_sha256"),
    ],
)
def test_a_manifest_that_was_changed_later(
    packed: Packed, change: Callable[[dict[str, Any]], Any]
) -> None:
    """What would give wrong answers and contradicts nothing is found out by its hash."""
    manifest = packed.manifest()
    change(manifest)
    (packed.path / "pack.json").write_text(json.dumps(manifest))
    for use in (Pack.load, verify):
        with pytest.raises(BundleError, match=r"was changed after|has no 'manifest_sha256'"):
            use(packed.path)


def test_an_engine_says_every_pass(built_pack: Path) -> None:
    """Those over the task, then those over the graphs that all tasks share."""
    manifest = read_pack(built_pack)
    shared = [entry["name"] for entry in manifest.passes]
    names = [entry["name"] for entry in manifest.engine("tone").passes]
    assert shared
    assert names[-len(shared) :] == shared
    assert "factor-pyramid" in names[: -len(shared)]


def test_no_engine_of_a_folded_task_is_kept(built_pack: Path, tmp_path: Path) -> None:
    """TensorRT would find it again for another task: the weights are in no file."""
    requests = [("TensorrtExecutionProvider", {"cache": tmp_path / "engines"})]
    pack = Pack(built_pack, read_pack(built_pack), requests, 1)
    with pytest.raises(OptionError, match="a folded task cannot be kept"):
        pack.engine("tone", folded=True)


def test_a_manifest_comes_back_as_it_was(built_pack: Path) -> None:
    data = json.loads((built_pack / "pack.json").read_text())
    assert sealed(read_pack(built_pack).to_json()) == data


def test_a_file_of_another_size(packed: Packed) -> None:
    with (packed.path / "weights.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"weights\.bin has \d+ bytes"):
        Pack.load(packed.path)
