"""Sessions that engines share, threads and processes that use them, and warming them up."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eptc.errors import InputError
from eptc.runtime import Engine, load_manifest
from eptc.runtime.loading import open_graphs, open_tokenizer
from eptc.runtime.providers import choose


def model(bundle: Path, threads: int = 1, options: Any = None) -> Any:
    requests = choose([("cpu", options or {})])
    return open_graphs(bundle, load_manifest(bundle), requests, threads, strict=True)["model"]


def test_one_session_for_one_bundle(
    classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as one engine holds it; another bundle, or other options, have their own."""
    first = model(classifier.path)
    with monkeypatch.context() as patch:
        patch.setattr("eptc.runtime.engine_sessions.open_session", None)  # no second one is opened
        assert model(classifier.path) is first
    assert model(classifier.path, threads=2) is not first
    assert (
        model(classifier.path, options={"arena_extend_strategy": "kNextPowerOfTwo"}) is not first
    )
    assert model(shutil.copytree(classifier.path, tmp_path / "copy")) is not first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


def test_one_tokenizer(classifier: Any, writer: Any) -> None:
    first = open_tokenizer(classifier.path, load_manifest(classifier.path))
    assert open_tokenizer(classifier.path, load_manifest(classifier.path)) is first
    assert open_tokenizer(writer.path, load_manifest(writer.path)) is not first


def test_a_bundle_that_was_replaced(classifier: Any, tmp_path: Path) -> None:
    """At the same place, by one of the same size: it is loaded anew."""
    bundle = shutil.copytree(classifier.path, tmp_path / "bundle")
    feeds = {
        "input_ids": [[5, 6]],
        "attention_mask": [[1, 1]],
        "token_type_ids": [[0, 0]],
    }
    with Engine.load(bundle, ["cpu"]) as old:
        before = old.run(feeds)["logits"]
        weights = np.fromfile(bundle / "weights.bin", np.float32)
        (2 * weights).tofile(tmp_path / "other.bin")
        (tmp_path / "other.bin").rename(bundle / "weights.bin")
        with Engine.load(bundle, ["cpu"]) as new:
            assert not np.allclose(new.run(feeds)["logits"], before)
        np.testing.assert_array_equal(old.run(feeds)["logits"], before)


def test_close_leaves_the_others(classifier: Any) -> None:
    with Engine.load(classifier.path, ["cpu"]) as first, Engine.load(classifier.path) as second:
        expected = second.classify(["rain"])
        first.close()
        assert second.classify(["rain"]) == expected
        with pytest.raises(InputError, match="closed"):
            first.classify(["rain"])


def test_concurrent_run(lowered_bert: Any) -> None:
    """Arrays of changing shapes from many threads, on two engines that share a session."""
    random = np.random.default_rng(0)
    feeds = [
        {
            "input_ids": random.integers(4, 60, shape),
            "attention_mask": np.ones(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for shape in [(1 + i % 5, 2 + i % 7) for i in range(60)]
    ]
    with (
        Engine.load(lowered_bert.path, ["cpu"], 2) as a,
        Engine.load(lowered_bert.path, None, 2) as b,
    ):
        expected = [a.run(feed)["logits"] for feed in feeds]
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(lambda i: (a, b)[i % 2].run(feeds[i])["logits"], range(len(feeds)))
            )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_close_during_calls(writer: Any) -> None:
    """Each call gives its answer or says that the engine is closed; nothing crashes."""
    engine = Engine.load(writer.path, ["cpu"], threads=1)
    expected = engine.generate(["rain fell"])
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(engine.generate, ["rain fell"]) for _ in range(400)]
        calls[20].result()
        engine.close()
    refusals = [call.exception() for call in calls if call.exception() is not None]
    assert all(isinstance(error, InputError) for error in refusals)
    assert {str(error).splitlines()[0] for error in refusals} == {"the engine is closed"}
    assert all(call.result() == expected for call in calls if call.exception() is None)


FORKED = """
import os, sys
from eptc.errors import InputError
from eptc.runtime import Engine
engine = Engine.load(sys.argv[1], ["cpu"], threads=2)
expected = engine.classify(["rain"])
feeds, fixed = engine.tokenize(["rain"]), engine.fixed(1, 16)
fixed._turn.acquire()  # as by another thread at the moment of the fork
if os.fork() == 0:
    for ask in (lambda: engine.classify(["rain"]), lambda: fixed.run(feeds), fixed.replay):
        try:
            ask()
            os._exit(1)
        except InputError as error:
            assert "forked" in error.found
    with Engine.load(sys.argv[1], ["cpu"], threads=2) as own:
        os._exit(0 if own.classify(["rain"]) == expected else 2)
code = os.waitstatus_to_exitcode(os.wait()[1])
assert engine.classify(["rain"]) == expected
os._exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork(classifier: Any) -> None:
    """In the child the parent's engine says so, and one of the child's own works."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(classifier.path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def watch(engine: Engine) -> list[tuple[str, tuple[int, ...]]]:
    """Return a list that gets each run's graph and the shape of its token ids."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def watched(name: str, run: Any) -> Any:
        def call(feeds: Any, *rest: Any, **named: Any) -> Any:
            seen.append((name, feeds["input_ids"].shape))
            return run(feeds, *rest, **named)

        return call

    for name, graph in engine._graphs.items():
        for method in ("run", "run_bound"):
            setattr(graph, method, watched(name, getattr(graph, method)))
    return seen


WARM = {
    "classifier": [("model", (2, 3)), ("model", (3, 5))],
    "writer": [("model", (2, 3)), ("model", (2, 1)), ("model", (3, 5)), ("model", (3, 1))],
    "lowered_t5": [
        ("encoder", (2, 3)), ("decoder", (2, 1)), ("encoder", (3, 5)), ("decoder", (3, 1)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("which", WARM)
def test_warm_up(which: str, request: pytest.FixtureRequest) -> None:
    """Every graph runs on the given shapes, and the answers stay what they were."""
    path = request.getfixturevalue(which).path

    def answer(engine: Engine) -> Any:
        ask: Any = engine.classify if which == "classifier" else engine.generate
        return ask(["rain"])

    with Engine.load(path, ["cpu"], threads=1) as engine:
        expected = answer(engine)
    with Engine.load(path, ["cpu"], threads=1, warm_up=True) as engine:
        seen = watch(engine)
        engine.warm_up([(2, 3), (3, 5)])
        assert set(seen) == set(WARM[which])
        assert answer(engine) == expected


def test_warm_up_at_loading(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is asked for."""
    calls: list[Engine] = []
    monkeypatch.setattr(Engine, "warm_up", lambda self: calls.append(self))
    Engine.load(classifier.path, ["cpu"]).close()
    assert not calls
    with Engine.load(classifier.path, ["cpu"], warm_up=True) as engine:
        assert calls == [engine]


def test_warm_up_with_a_wrong_shape(writer: Any) -> None:
    """More tokens than the model has places for: an error, and the engine stays usable."""
    with Engine.load(writer.path, ["cpu"]) as engine:
        with pytest.raises(InputError, match="do not fit the model"):
            engine.warm_up([(1, 32)])
        assert engine.generate(["rain"])
