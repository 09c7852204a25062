"""On a real cluster of several processes, one of which is killed: nothing lost, nothing twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import eptc
from eptc.builds import BuildPlan
from eptc.builds.run import make_orders
from eptc.builds.state import FOLDER

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e .[ray]"
)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "on_ray"
_COMMAND = "import sys; sys.argv[0] = 'eptc'; from eptc.cli import main; main()"
_MARK = "EPTC_TEST_CLUSTER"
_PATIENCE = 300.0


# Two nodes of one and two CPUs, as far as they believe; until nobody listens any more.
_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 100 * 2**20}
cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small})
cluster.add_node(num_cpus=2, **small)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes."""
    # Not in a test's folder: the path of a socket has a hundred characters at most.
    temporary = tempfile.TemporaryDirectory(prefix="eptc-", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            _MARK: secrets.token_hex(8),
            "OMP_NUM_THREADS": "1",
            # Nothing is reported, and nothing stays: neither in the user's home nor in /tmp.
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            # What else runs on this machine is no reason to kill a worker.
            "RAY_memory_monitor_refresh_ms": "0",
        }.items():
            patch.setenv(name, value)
        process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        lines = (line.split() for line in process.stdout)
        address = next((words[1] for words in lines if words[:1] == ["address"]), "")
        assert address, "the cluster did not start"
        patch.setenv("RAY_ADDRESS", address)
        yield address
        process.communicate(timeout=_PATIENCE)


def _workers(title: str) -> list[int]:
    """Return the processes of this module's cluster that are doing something."""
    mark, found = f"{_MARK}={os.environ[_MARK]}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            does = (folder / "cmdline").read_bytes().startswith(f"ray::{title}".encode())
            if does and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile, or is not ours
            continue
    return found


def _until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + _PATIENCE
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    return found


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _sure(answer: Any) -> float:
    return float(max(answer.probabilities))


@pytest.fixture(scope="module")
def bundle(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ray") / "bundle"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out)
    return out


def test_a_plan_is_built_whoever_dies(cluster: str, small_native: Any, tmp_path: Path) -> None:
    """A killed build is made again by another process, once; all equal local ones to the byte."""
    (tmp_path / "in").symlink_to(small_native.root / "in")
    text = (
        'schema = 1\nout = "WHERE/{task}-{precision}"\n'
        '[defaults]\nckpt = "in/ckpt"\nbase = "in/base"\n'
        '[matrix]\nprecision = ["fp32", "int8"]\ntask = ["tone", "same"]\n'
    )
    plan, engines = tmp_path / "ray.toml", tmp_path / "ray"
    plan.write_text(text.replace("WHERE", "ray"))
    process = _start("-c", _COMMAND, "build", plan, "--json", "--ray", cluster)
    # It has begun to write: half a bundle, under a name that is none.
    _until(lambda: list(engines.glob(".same-int8.eptc-*/*")), process)
    [victim] = _workers("same-int8")
    os.kill(victim, signal.SIGKILL)
    at_kill = {path: path.stat().st_ino for path in engines.glob("[!.]*/manifest.json")}
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    names = ["tone-fp32", "same-fp32", "tone-int8", "same-int8"]
    states = [(build["name"], build["state"]) for build in json.loads(out)["builds"]]
    assert states == [(name, "built") for name in names]
    assert {path.name for path in engines.iterdir()} == {*names, FOLDER}
    assert {path: path.stat().st_ino for path in at_kill} == at_kill
    # On the cluster nothing is made again.
    assert all(order.done for order in make_orders(BuildPlan.read(plan)))
    plan.write_text(text.replace("WHERE", "local"))
    assert eptc.build_all(plan).exit_code == 0
    for name in names:
        assert _files(engines / name) == _files(tmp_path / "local" / name)


def _one_build(native: Any, folder: Path) -> Path:
    """Write the plan of a single build; return its file."""
    (folder / "in").symlink_to(native.root / "in")
    plan = folder / "plan.toml"
    plan.write_text(
        'schema = 1\nout = "out/{task}"\n[defaults]\nckpt = "in/ckpt"\nbase = "in/base"\n'
        '[matrix]\ntask = ["tone"]\n'
    )
    return plan


def test_a_build_that_always_dies_is_given_up(
    cluster: str, small_native: Any, tmp_path: Path
) -> None:
    """After a few times; it is the cluster that failed, and nothing is left of it."""
    plan = _one_build(small_native, tmp_path)
    process = _start("-c", _COMMAND, "build", plan, "--json", "--ray", cluster)
    end = time.monotonic() + _PATIENCE
    while process.poll() is None:
        assert time.monotonic() < end
        for victim in _workers("tone"):
            with contextlib.suppress(ProcessLookupError):  # it was dying of the last one
                os.kill(victim, signal.SIGKILL)
        time.sleep(0.005)
    out, err = process.communicate()
    assert process.returncode == 2, (out, err)
    [build] = json.loads(out)["builds"]
    assert "Ray gave it up: WorkerCrashedError" in build["error"]
    assert not (tmp_path / "out" / "tone").exists()


@pytest.mark.usefixtures("cluster")
def test_fewer_rows_than_blocks(bundle: Path, tmp_path: Path) -> None:
    """A block without rows reaches no engine."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "labelled"
    source.write_text('{"id": 1, "text": "the film was good"}\n')
    process = _start(EXAMPLES / "batch.py", bundle, source, out)
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 0, err
    [row] = [json.loads(line) for path in out.iterdir() for line in path.read_text().splitlines()]
    assert row["id"] == 1
    assert "label" in row


@pytest.mark.usefixtures("cluster")
def test_every_row_is_labelled_once(bundle: Path, tmp_path: Path) -> None:
    """The example of `map_batches`, whose worker dies in the middle."""
    words = ("the film was good and short ", "a dull long film not quiet ")
    rows: list[dict[str, Any]] = [
        {"id": i, "text": words[i % 2] * (5 + i % 7)} for i in range(16_000)
    ]
    source, out = tmp_path / "rows.jsonl", tmp_path / "labelled"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = _start(EXAMPLES / "batch.py", bundle, source, out)
    _until(lambda: list(out.glob("*.json")), process)
    victim = _workers("MapWorker(MapBatches(Classify))")[0]
    os.kill(victim, signal.SIGKILL)
    written = len(list(out.glob("*.json")))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    files = list(out.iterdir())
    assert written < len(files)  # it was in the middle
    found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert sorted(row["id"] for row in found) == list(range(len(rows)))
    with eptc.Engine.load(bundle, providers=["cpu"]) as engine:
        answers = {text: engine.classify([text])[0] for text in {row["text"] for row in rows}}
    for row in found:
        assert row["text"] == rows[row["id"]]["text"]
        assert row["label"] == answers[row["text"]].label
        assert row["probability"] == pytest.approx(_sure(answers[row["text"]]))


@pytest.fixture
def port() -> Iterator[int]:
    """A free port that nobody else is given meanwhile: Serve's proxies share theirs."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.usefixtures("cluster")
def test_requests_outlive_a_replica(
    bundle: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of Serve: every request is answered, rightly, while a replica is killed."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import client  # type: ignore[import-not-found]

    process = _start(EXAMPLES / "serve.py", bundle, "--replicas", 2, "--port", port)
    url, texts = f"http://127.0.0.1:{port}/", ["the film was good", "a dull long film", "not bad"]
    try:
        with eptc.Engine.load(bundle, providers=["cpu"]) as engine:
            right = {text: engine.classify([text])[0] for text in texts}
        assert client.ask(url, texts[0], patience=_PATIENCE)["label"] == right[texts[0]].label
        before = _until(lambda: (p := _workers("ServeReplica")) and len(p) == 2 and p, process)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [texts[i % 3] for i in range(600)]
            ask = functools.partial(client.ask, url, patience=_PATIENCE)
            futures = [pool.submit(ask, text) for text in asked]
            _until(lambda: futures[100].done(), process)
            os.kill(before[0], signal.SIGKILL)
            assert not futures[-1].done()  # in the middle
            answers = [future.result(timeout=_PATIENCE) for future in futures]
        for text, answer in zip(asked, answers, strict=True):
            assert answer["label"] == right[text].label
            assert answer["probability"] == pytest.approx(_sure(right[text]))
        # There are two again.
        _until(lambda: len(set(_workers("ServeReplica")) - {before[0]}) == 2, process)
        with pytest.raises(Exception, match="422"):
            client.ask(url, 3)
    finally:
        process.terminate()  # SIGINT may be ignored here, as it is in the background of a shell
        process.communicate(timeout=_PATIENCE)
    end = time.monotonic() + _PATIENCE
    while left := _workers("ServeReplica"):  # Ray ends them, in its own time
        assert time.monotonic() < end, left
        time.sleep(0.005)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_no_cluster_is_said_at_once(
    address: str, small_native: Any, tmp_path: Path, cli: Any
) -> None:
    plan = _one_build(small_native, tmp_path)
    done = cli("build", plan, "--ray", address)
    assert done.code == 2
    assert f"there is no Ray cluster at {address}" in done.stderr
    assert not (tmp_path / "out").exists()
