"""The cache of traced graphs: found again, never wrong, never in the way."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib.metadata
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from eptc import lower, skeletons
from eptc.cache import cache_folder
from eptc.skeletons import Skeleton, known_parameters, skeleton

CONFIG: Any = BertConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    num_labels=3,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EPTC_CACHE_DIR", str(folder))
    skeletons._skeleton.cache_clear()
    return folder


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been traced since."""
    found: list[Any] = []
    sound = lower.trace

    def trace(config: Any, **options: Any) -> Any:
        found.append(config)
        return sound(config, **options)

    monkeypatch.setattr(lower, "trace", trace)
    return found


def _get(config: Any = CONFIG, opset: int = 20) -> Skeleton:
    """Return the skeleton as a new process would."""
    skeletons._skeleton.cache_clear()
    return skeleton(config, opset=opset, tied_head=False)


def _text(found: Skeleton) -> dict[str, str]:
    return {name: str(model.graph) for name, model in found.graphs.items()}


def _files(cache: Path) -> list[Path]:
    return sorted((cache / "skeletons").iterdir())


def test_a_second_build_traces_nothing(cache: Path, traces: list[Any]) -> None:
    first, second = _get(), _get()
    assert len(traces) == 1
    assert _text(first) == _text(second)
    assert first.parameters == second.parameters
    (path,) = _files(cache)
    assert path.suffix == ".zip"


def test_parameters_are_those_of_the_model(cache: Path, traces: list[Any]) -> None:
    wanted = lower.expected_parameters(CONFIG, tied_head=False)
    assert known_parameters(CONFIG, opset=20, tied_head=False) == wanted
    assert not traces
    assert not cache.exists()
    assert _get().parameters == wanted
    assert known_parameters(CONFIG, opset=20, tied_head=False) == wanted


@pytest.mark.usefixtures("cache")
def test_labels_may_have_other_names_but_not_another_number(traces: list[Any]) -> None:
    named = copy.deepcopy(CONFIG)
    named.id2label = {0: "a", 1: "b", 2: "c"}
    more = copy.deepcopy(CONFIG)
    more.num_labels = 4
    for config in (CONFIG, named, more):
        _get(config)
    assert [config.num_labels for config in traces] == [3, 4]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("what", ["opset", "eps", "code", "tool"])
def test_whatever_a_graph_depends_on_is_in_the_key(
    traces: list[Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _get()
    config = copy.deepcopy(CONFIG)
    if what == "eps":
        config.layer_norm_eps = 1e-3
    if what == "code":
        monkeypatch.setattr(skeletons, "_code", lambda: "another")
    if what == "tool":
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    _get(config, opset=21 if what == "opset" else 20)
    assert len(traces) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "member", "graph"])
def test_a_damaged_entry_is_made_again(
    cache: Path, traces: list[Any], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    sound = _text(_get())
    (path,) = _files(cache)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    if damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "text":
        path.write_text("nothing of the kind")
    if damage in ("member", "graph"):
        with zipfile.ZipFile(path, "w") as archive:
            if damage == "graph":
                archive.writestr("parameters.json", json.dumps({"w": [1]}))
            archive.writestr("model.onnx", b"\xff\xff no graph")
    with caplog.at_level(logging.WARNING, logger="eptc"):
        assert _text(_get()) == sound
    assert "damaged" in caplog.text
    assert len(traces) == 2
    assert _text(_get()) == sound
    assert len(traces) == 2  # it was mended


def test_without_a_cache_everything_is_traced(
    cache: Path, traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPTC_CACHE_DIR", "")
    assert cache_folder() is None
    _get()
    _get()
    assert len(traces) == 2
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_harms_nothing(
    tmp_path: Path, traces: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("EPTC_CACHE_DIR", str(in_the_way))
    _get()
    _get()
    assert len(traces) == 2
    assert in_the_way.read_text() == ""


def test_a_writer_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", refuse)
    _get()
    assert _files(cache) == []


def test_several_writers_at_once(cache: Path) -> None:
    members = {"parameters.json": b"{}"}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: skeletons._store("key", members), range(50)))
    assert [path.name for path in _files(cache)] == ["key.zip"]
    found = skeletons._load("key")
    assert found is not None
    assert found.parameters == {}


@pytest.mark.usefixtures("cache")
def test_a_caller_may_change_its_copy() -> None:
    found = _get()
    before = _text(found)
    graph = found.copy_graphs()["model"].graph
    graph.inputs[0].name = "changed"
    graph.remove(next(reversed(list(graph))))
    assert _text(found) == before


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPTC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "eptc"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "eptc"
