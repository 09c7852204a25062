"""The example service, as a process of its own with real engines, under load and under attack."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

import eptc

pytestmark = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("batched", "fastapi", "prometheus_client", "pydantic_settings", "uvicorn")
    ),
    reason="needs what the service runs on: pip install -e .[dev]",
)

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "examples" / "service"
WORDS = ("bad", "dull", "film", "good", "long", "not", "quiet", "short", "the", "very", "was")
# Nothing of the compiler can be imported in the server: the runtime is all it has.
START = """
import runpy, sys
sys.modules.update(dict.fromkeys(
    ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "optimum")
))
runpy.run_module("service", run_name="__main__", alter_sys=True)
"""
# Rounding in float32: a text's place in a batch and the padding beside it move its last digits.
ROUNDING = 1e-5
PATIENCE = 60.0


@dataclasses.dataclass
class Server:
    """A running service.

    Args:
        process: it.
        url: where it listens.
        log: what it printed.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.url, timeout=PATIENCE)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=PATIENCE)

    def ready(self) -> Any:
        return self.get("/ready").json()

    def measured(self) -> dict[str, float]:
        """Every sample at /metrics, by name and labels."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.get("/metrics").text)
        return {
            s.name + "".join(f" {v}" for v in s.labels.values()): s.value
            for family in families
            for s in family.samples
        }


@contextlib.contextmanager
def serving(bundle: Path, log: Path, **settings: object) -> Iterator[Server]:
    """Start the service on a free port and stop it as an orchestrator does."""
    process = start(bundle, log, settings)
    try:
        found = until(lambda: re.search(r"running on (http://\S+)", log.read_text()), process)
        yield Server(process, found[1], log)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def start(bundle: Path, log: Path, settings: dict[str, object]) -> subprocess.Popen[bytes]:
    given = {"bundle": bundle, "port": 0, "threads": 1, "providers": '["cpu"]', **settings}
    environment = {f"SERVICE_{name.upper()}": str(value) for name, value in given.items()}
    path = os.pathsep.join((str(SERVICE.parent), str(ROOT)))
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", START], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )  # fmt: skip


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Wait for something to be true; fail where it never is."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process is None or process.poll() is None, "the server ended"
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return found


@dataclasses.dataclass(frozen=True)
class Made:
    """Two bundles of one task that answer differently, and one of another task.

    Args:
        old: the first.
        new: the second.
        other: of another task.
        texts: texts whose values under both are all further apart than rounding.
        values: of each text, by the bundle's SHA-256.
    """

    old: Path
    new: Path
    other: Path
    texts: tuple[str, ...]
    values: dict[str, dict[str, float]]

    def sha256(self, bundle: Path) -> str:
        return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()

    def check(self, text: str, response: httpx2.Response) -> str:
        """Check that a response is the text's own answer; return the bundle it is from."""
        assert response.status_code == 200, response.text
        said = response.json()
        assert set(said) == {"value", "bundle"}
        assert said["value"] == pytest.approx(self.values[said["bundle"]][text], abs=ROUNDING)
        return str(said["bundle"])


@pytest.fixture(scope="module")
def made(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    import safetensors.numpy

    root = tmp_path_factory.mktemp("service")
    shutil.copytree(small_native.ckpt, root / "ckpt")
    weights = root / "ckpt" / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    weights.unlink()
    safetensors.numpy.save_file({n: 1.3 * t for n, t in tensors.items()}, weights)
    for name, ckpt, task in (
        ("old", small_native.ckpt, "score"),
        ("new", root / "ckpt", "score"),
        ("other", small_native.ckpt, "tone"),
    ):
        eptc.export(ckpt, base=small_native.base, task=task, out=root / name)
    drawn = random.Random(0)
    engines = [eptc.Engine.load(root / name, ["cpu"]) for name in ("old", "new")]
    kept: dict[str, tuple[float, ...]] = {}
    for _ in range(120):
        text = " ".join(drawn.choices(WORDS, k=drawn.randint(1, 40)))
        values = tuple(float(engine.classify([text])[0].value or 0.0) for engine in engines)
        others = [v for pair in kept.values() for v in pair]
        if all(abs(a - b) > 10 * ROUNDING for a in values for b in others):
            kept[text] = values
    assert len(kept) > 60
    bundles = Made(root / "old", root / "new", root / "other", tuple(kept), {})
    for i, bundle in enumerate((bundles.old, bundles.new)):
        bundles.values[bundles.sha256(bundle)] = {text: v[i] for text, v in kept.items()}
    assert len(bundles.values) == 2
    return bundles


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that waits long enough for batches to form, and takes every request."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(made.old, log, max_wait_ms=20, max_batch=16, max_queue=10_000) as started:
        yield started


async def ask(
    client: httpx2.AsyncClient, inputs: Sequence[Any], at_once: int = 32
) -> list[httpx2.Response]:
    """Ask for every input, so many at a time; responses in order."""
    free = asyncio.Semaphore(at_once)

    async def one(value: Any) -> httpx2.Response:
        async with free:
            return await client.post("/answer", json={"input": value})

    return await asyncio.gather(*map(one, inputs))


# ---- answers


def test_each_answer_under_load_is_the_texts_own(made: Made, server: Server) -> None:
    texts = [*made.texts * 5][:400]
    random.Random(1).shuffle(texts)
    inputs = [{"text": text} if i % 2 else text for i, text in enumerate(texts)]
    before = server.measured()

    async def run() -> list[httpx2.Response]:
        async with server.client() as client:
            return await ask(client, inputs)

    responses = asyncio.run(run())
    assert {made.check(t, r) for t, r in zip(texts, responses, strict=True)} == {
        made.sha256(made.old)
    }
    after = server.measured()
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    assert change["service_requests_total 200"] == change["service_request_seconds_count"] == 400
    assert change["service_batch_size_sum"] == 400
    assert change["service_batch_size_count"] < 200, "texts were not put together"
    assert after["service_batch_size_bucket 16.0"] == after["service_batch_size_count"]
    assert after["service_queue_length"] == 0


def test_other_kinds_of_task(
    small_native: Any, small_mept: Any, made: Made, tmp_path: Path
) -> None:
    eptc.export(small_native.ckpt, base=small_native.base, task="same", out=tmp_path / "same")
    folders = small_mept("t5", tokenizer_pad_token_id=0)
    eptc.export(folders.ckpt, base=folders.base, task=0, out=tmp_path / "written")
    texts = ["good film", "bad", "the long film was not good"]
    pairs = list(itertools.pairwise([*texts, "dull"]))
    fields = [{"second": b, "first": a} for a, b in pairs]
    cases: list[tuple[Path, Sequence[Any], Sequence[Any]]] = [
        (made.other, texts, texts),
        (tmp_path / "same", [*pairs, *fields], [*pairs, *pairs]),
        (tmp_path / "written", texts, texts),
    ]
    for bundle, inputs, wanted in cases:

        async def run(server: Server, inputs: Sequence[Any] = inputs) -> list[httpx2.Response]:
            async with server.client() as client:
                return await ask(client, inputs)

        with serving(bundle, tmp_path / "log") as server:
            responses = asyncio.run(run(server))
        with eptc.Engine.load(bundle, ["cpu"]) as engine:
            for given, response in zip(wanted, responses, strict=True):
                said = response.json()
                if "text" in said:
                    assert said["text"] == engine.generate([given])[0].text
                    continue
                (alone,) = engine.classify([given])
                assert said["label"] == alone.label
                assert said["probabilities"] == pytest.approx(alone.probabilities, abs=ROUNDING)


def test_an_engine_of_several_tasks(small_native: Any, tmp_path: Path) -> None:
    """Requests of every task share batches; one that names none is refused by itself."""
    bundle = tmp_path / "several"
    eptc.export(small_native.ckpt, base=small_native.base, task="all", out=bundle)
    texts = ["good film", "bad", "the long film was not good", "dull"]
    asked = [
        {"input": (text, "bad") if task == "same" else text, "task": task}
        for text in texts
        for task in ("tone", "same", "score", "sentiment")
    ]
    bad = [{"input": "film"}, {"input": "film", "task": "mood"}]

    async def run(server: Server) -> list[httpx2.Response]:
        async with server.client() as client:
            return await asyncio.gather(
                *(client.post("/answer", json=body) for body in [*asked, *bad])
            )

    with serving(bundle, tmp_path / "log", max_wait_ms=50) as server:
        responses = asyncio.run(run(server))
        assert server.ready()["tasks"] == ["tone", "same", "score"]
        assert server.measured()["service_batch_size_count"] < len(responses)
    with eptc.Engine.load(bundle, ["cpu"]) as engine:
        for body, response in zip(asked, responses, strict=False):
            (alone,) = engine.classify([body["input"]], tasks=str(body["task"]))
            said = response.json()
            assert (said.get("label"), said.get("value")) == (
                alone.label, alone.value and pytest.approx(alone.value, abs=ROUNDING),
            )  # fmt: skip
            assert said.get("probabilities") == (
                alone.probabilities and pytest.approx(alone.probabilities, abs=ROUNDING)
            )
    for response in responses[len(asked) :]:
        assert response.status_code == 422
        assert "tone, same, score" in response.text or "0 tone, 1 same" in response.text


# ---- what is refused


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    """A body whose length nobody said."""
    for piece in pieces:
        yield piece


JSON = {"content-type": "application/json"}
BAD: dict[str, tuple[bytes | None, dict[str, str], int, str]] = {
    "no json": (b"film", JSON, 422, "JSON decode error"),
    "nothing": (b"", JSON, 422, "Field required"),
    "no json's type": (b'{"input": "film"}', {"content-type": "text/plain"}, 422, "valid dict"),
    "not utf-8": (b'{"input": "\xff\xfe"}', JSON, 400, "parsing the body"),
    "utf-8 cut short": (b'{"input": "film \xe2\x82"}', JSON, 400, "parsing the body"),
    "a surrogate": (b'{"input": "\\ud800"}', JSON, 422, "not valid Unicode"),
    "a surrogate as a name": (b'{"input": {"\\ud800": 1}}', JSON, 422, "valid string"),
    "not a number": (b'{"input": NaN}', JSON, 422, "valid string"),
    "a number": (b'{"input": 3}', JSON, 422, "valid string"),
    "nothing as text": (b'{"input": null}', JSON, 422, "valid string"),
    "a list": (b'{"input": ["film", "good", "bad"]}', JSON, 422, "at most 2 items"),
    "a pair": (b'{"input": ["film", "good"]}', JSON, 422, "1 text: text"),
    "unknown field": (b'{"input": {"words": "film"}}', JSON, 422, "without 'text'"),
    "unknown task": (b'{"input": "film", "task": "mood"}', JSON, 422, "there is no task 'mood'"),
    "unknown key": (b'{"input": "film", "truncate": true}', JSON, 422, "Extra inputs"),
    "too many fields": (
        json.dumps({"input": dict.fromkeys(map(str, range(17)), "a")}).encode(), JSON, 422,
        "at most 16 items",
    ),
    "deep": (b"[" * 60_000, JSON, 400, "parsing the body"),
    "too many tokens": (json.dumps({"input": "film " * 300}).encode(), JSON, 422, "tokens"),
    "too many bytes": (b'{"input": "' + b"a" * 70_000 + b'"}', JSON, 413, "Too Large"),
    "too many bytes in pieces": (None, JSON, 413, "Too Large"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused(made: Made, server: Server, name: str) -> None:
    """Beside good ones, which are answered as ever."""
    body, headers, code, words = BAD[name]
    texts = made.texts[:12]

    async def run() -> tuple[httpx2.Response, list[httpx2.Response]]:
        content: Any = body
        if body is None:
            content = chunks(b'{"input": "', *[b"a" * 1000] * 70, b'"}')
        async with server.client() as client:
            bad = client.post("/answer", content=content, headers=headers)
            return await asyncio.gather(bad, ask(client, texts))

    refused, answered = asyncio.run(run())
    assert refused.status_code == code, refused.text
    assert words in refused.text
    assert len(refused.content) < 1000, "a refusal does not send the request back"
    for text, response in zip(texts, answered, strict=True):
        made.check(text, response)


def test_texts_that_are_refused_spoil_no_batch(made: Made, server: Server) -> None:
    """Every fifth is too long; each stands in a batch with others."""
    texts = made.texts[:60]
    inputs = [text if i % 5 else "film " * 300 for i, text in enumerate(texts)]

    async def run() -> list[httpx2.Response]:
        async with server.client() as client:
            return await ask(client, inputs)

    for i, (text, response) in enumerate(zip(texts, asyncio.run(run()), strict=True)):
        if i % 5:
            made.check(text, response)
        else:
            assert response.status_code == 422
            assert "tokens" in response.text


def test_texts_may_be_cut(made: Made, tmp_path: Path) -> None:
    text = "film " * 300
    with serving(made.old, tmp_path / "log", truncate=True) as server:
        said = httpx2.post(server.url + "/answer", json={"input": text}).json()
    with eptc.Engine.load(made.old, ["cpu"]) as engine:
        (alone,) = engine.classify([text], truncate=True)
    assert said["value"] == pytest.approx(alone.value, abs=ROUNDING)


def test_a_full_queue_refuses_and_loses_nothing(made: Made, tmp_path: Path) -> None:
    """The first batch is not taken before all requests are there: beyond four all are refused."""
    texts = made.texts[:40]

    async def run(server: Server) -> list[httpx2.Response]:
        async with server.client() as client:
            return await ask(client, texts, at_once=len(texts))

    with serving(made.old, tmp_path / "log", max_queue=4, max_wait_ms=4000) as server:
        responses = asyncio.run(run(server))
        counted = Counter(response.status_code for response in responses)
        assert counted == {200: 4, 429: 36}
        for text, response in zip(texts, responses, strict=True):
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
            else:
                made.check(text, response)
        measured = server.measured()
        assert measured["service_requests_total 429"] == 36
        assert measured["service_queue_length"] == 0
        again = httpx2.post(server.url + "/answer", json={"input": texts[0]}, timeout=PATIENCE)
        made.check(texts[0], again)  # there is room again


def test_an_answer_that_takes_too_long_is_given_up(made: Made, tmp_path: Path) -> None:
    """No batch is taken before a minute has passed."""
    with serving(
        made.old, tmp_path / "log", max_wait_ms=60_000, timeout_seconds=0.05, max_queue=1
    ) as server:
        for _ in range(3):  # each gives its place back
            late = httpx2.post(server.url + "/answer", json={"input": "film"}, timeout=PATIENCE)
            assert late.status_code == 504
        assert server.measured()["service_queue_length"] == 0


# ---- other bundles


def point(link: Path, bundle: Path) -> None:
    """Let a link lead elsewhere, in one step."""
    other = link.with_name("other-link")
    other.symlink_to(bundle)
    other.replace(link)


def test_bundles_are_swapped_under_load(made: Made, tmp_path: Path) -> None:
    """Every answer is one of the two engines', none is lost, and no older one comes later."""
    link = tmp_path / "current"
    point(link, made.old)
    turns = [made.old, made.new] * 20

    async def load(client: httpx2.AsyncClient, said: list[str], end: asyncio.Event) -> None:
        for text in itertools.cycle(made.texts):
            said.append(made.check(text, await client.post("/answer", json={"input": text})))
            if end.is_set():
                return

    async def run(server: Server) -> list[list[str]]:
        callers: list[list[str]] = [[] for _ in range(8)]
        end = asyncio.Event()
        async with (
            asyncio.timeout(PATIENCE),
            server.client() as client,
            asyncio.TaskGroup() as group,
        ):
            for said in callers:
                group.create_task(load(client, said, end))
            for bundle in turns:
                point(link, bundle)
                while any(said[-1:] != [made.sha256(bundle)] for said in callers):
                    await asyncio.sleep(0)
            end.set()
        return callers

    with serving(link, tmp_path / "log", watch_seconds=0.01) as server:
        callers = asyncio.run(run(server))
        measured = server.measured()
        assert server.ready() == {
            "bundle": made.sha256(made.new), "tasks": ["score"], "rejected": None,
        }  # fmt: skip
    for said in callers:
        assert [sha256 for sha256, _ in itertools.groupby(said)] == [*map(made.sha256, turns)]
    assert measured["service_requests_total 200"] == sum(map(len, callers))
    assert measured["service_reloads_total swapped"] == len(turns) - 1


def test_a_rebuilt_folder_is_swapped_on_a_signal(made: Made, tmp_path: Path) -> None:
    """As `eptc export --force` replaces it: another folder under the same name."""
    place = tmp_path / "bundle"
    shutil.copytree(made.old, place)
    text = made.texts[0]
    with serving(place, tmp_path / "log", watch_seconds=0) as server:
        first = httpx2.post(server.url + "/answer", json={"input": text})
        assert made.check(text, first) == made.sha256(made.old)
        shutil.copytree(made.new, tmp_path / "next")
        place.rename(tmp_path / "before")
        (tmp_path / "next").rename(place)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.ready()["bundle"] == made.sha256(made.new), server.process)
        second = httpx2.post(server.url + "/answer", json={"input": text})
        assert made.check(text, second) == made.sha256(made.new)


def flip(bundle: Path) -> None:
    path = bundle / "weights.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(bundle: Path) -> None:
    path = bundle / "weights.bin"
    path.write_bytes(path.read_bytes()[:-1])


def newer(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 999}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip, "weights.bin: has SHA-256"),
    "cut": (cut, "weights.bin: has"),
    "no graph": (lambda b: (b / "model.onnx").unlink(), "model.onnx"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json"),
    "no json": (lambda b: (b / "manifest.json").write_text("{"), "manifest"),
    "newer": (newer, "schema version 999"),
    "gone": (shutil.rmtree, "No such file"),
}


def test_a_bad_bundle_is_not_swapped_in(made: Made, tmp_path: Path) -> None:
    """It is named where an operator looks; the old one answers, and the next good one is taken."""
    link, texts = tmp_path / "current", made.texts[:8]
    point(link, made.old)
    offered = []
    for i, (damage, words) in enumerate(DAMAGE.values()):
        shutil.copytree(made.new, tmp_path / f"bad-{i}")
        damage(tmp_path / f"bad-{i}")
        offered.append((tmp_path / f"bad-{i}", words))
    offered.append((made.other, "the bundle is for [('tone'"))
    offered.append((link, str(link)))  # a link to itself

    async def run(server: Server) -> set[str]:
        async with server.client() as client:
            responses = await ask(client, texts)
        return {made.check(t, r) for t, r in zip(texts, responses, strict=True)}

    with serving(link, tmp_path / "log", watch_seconds=0.02) as server:
        for number, (bundle, words) in enumerate(offered, 1):
            point(link, bundle)

            def seen(count: int = number) -> bool:
                return server.measured().get("service_reloads_total rejected", 0) == count

            until(seen, server.process)
            assert words in server.ready()["rejected"]
            assert server.get("/ready").status_code == 200
            assert server.measured()["service_bundle_rejected"] == 1
            assert asyncio.run(run(server)) == {made.sha256(made.old)}
        point(link, made.new)
        until(lambda: server.ready()["bundle"] == made.sha256(made.new), server.process)
        assert server.ready()["rejected"] is None
        assert server.measured()["service_bundle_rejected"] == 0
        assert asyncio.run(run(server)) == {made.sha256(made.new)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "weights.bin: has SHA-256"),
        ({"bundle": "/nowhere"}, "No such file"),
        ({"max_batch": 0}, "max_batch"),
        ({"providers": '["abacus"]'}, "abacus"),
    ],
)
def test_it_does_not_start_on_what_cannot_work(
    made: Made, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    bundle = made.old
    if not settings:
        bundle = tmp_path / "bad"
        shutil.copytree(made.old, bundle)
        flip(bundle)
    process = start(bundle, tmp_path / "log", settings)
    assert process.wait(PATIENCE) != 0
    assert words in (tmp_path / "log").read_text()


# ---- the end


def test_sigterm_lets_requests_under_way_finish(made: Made, tmp_path: Path) -> None:
    """All are waiting for their batch, which is taken after the signal."""
    texts = made.texts[:20]

    async def run(server: Server) -> list[httpx2.Response]:
        async with server.client() as client, server.client() as other:
            asked = asyncio.create_task(ask(client, texts))
            waiting = f"service_queue_length {len(texts)}.0"
            while waiting not in (await other.get("/metrics")).text:
                assert not asked.done(), "the batch was taken too soon"
            server.process.terminate()
            return await asked

    with serving(made.old, tmp_path / "log", max_wait_ms=4000, max_batch=32) as server:
        responses = asyncio.run(run(server))
        assert server.process.wait(PATIENCE) == -signal.SIGTERM
    for text, response in zip(texts, responses, strict=True):
        made.check(text, response)
    assert "Application shutdown complete" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


# ---- around it


def test_what_is_measured_can_be_read(made: Made, server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.ready() == {
        "bundle": made.sha256(made.old), "tasks": ["score"], "rejected": None,
    }  # fmt: skip
    measured = server.measured()
    for name in (
        "service_request_seconds_count", "service_queue_length", "service_batch_size_count",
        "service_bundle_rejected", "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in measured
    assert any(made.sha256(made.old) in name for name in measured if "bundle_info" in name)


def test_the_packages_are_the_runtime_and_a_web_server() -> None:
    lines = (SERVICE / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[<>=]", line)[0] for line in lines if line and line[0] != "#"}
    assert names == {
        "batched", "fastapi", "numpy", "onnxruntime", "prometheus-client", "pydantic-settings",
        "tokenizers", "uvicorn",
    }  # fmt: skip


def test_the_container_file() -> None:
    """As far as reading can tell: what it copies is there, and it does not end as root."""
    text = re.sub(r"\\\n", "", (SERVICE / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    stages = [rest for word, rest in lines if word == "FROM"]
    assert len(stages) == 2
    assert len({stage.split()[0] for stage in stages}) == 1, "the venv needs the same Python"
    kept = {line[1:] for line in (SERVICE / "Dockerfile.dockerignore").read_text().splitlines()}
    for word, rest in lines:
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert any(Path(source).is_relative_to(folder) for folder in kept), source
    last = lines[max(i for i, (word, _) in enumerate(lines) if word == "FROM") :]
    assert not any(word == "RUN" for word, _ in last), "the image has what was built, no more"
    (user,) = (rest for word, rest in last if word == "USER")
    assert int(user) > 0
    assert json.loads(last[-1][1]) == ["/venv/bin/python", "-m", "service"]
    settings = re.findall(r"SERVICE_(\w+)=", text)
    source = (SERVICE / "settings.py").read_text()
    assert all(f"    {name.lower()}: " in source for name in settings)
