"""Graphs kept on disk: the same answers, one copy of the weights, and never a wrong graph."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from eptc.errors import BundleError
from eptc.runtime import Engine
from eptc.runtime.cpus import cpu_kind
from eptc.runtime.prepacked import kept_in

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(cpu_kind() is None, reason="needs /proc/cpuinfo")

FEEDS = {
    name: np.array(rows)
    for name, rows in {
        "input_ids": [[5, 6, 7], [8, 9, 10]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "token_type_ids": [[0, 0, 1], [0, 0, 0]],
    }.items()
}


def load(bundle: Path, cache: Path | None) -> Engine:
    return Engine.load(bundle, ["cpu"], threads=1, cache=cache if cache is not None else False)


def logits(bundle: Path, cache: Path | None) -> Any:
    with load(bundle, cache) as engine:
        return engine.run(FEEDS)["logits"]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def stamp(cache: Path) -> list[tuple[str, int, int]]:
    """Return what tells one written file from another, also where a number is used again."""
    found = [(str(path), path.stat()) for path in sorted(cache.rglob("*"))]
    return [(path, status.st_ino, status.st_mtime_ns) for path, status in found]


def test_same_answers(lowered_bert: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the bit, when the graph is written and when it is read; it is written once."""
    expected = logits(lowered_bert.path, None)
    np.testing.assert_array_equal(logits(lowered_bert.path, tmp_path / "new" / "cache"), expected)
    (entry,) = entries(tmp_path / "new" / "cache")
    assert {path.name for path in entry.iterdir()} == {
        "graph.onnx", "graph.onnx.data", "entry.json",
    }  # fmt: skip
    before = stamp(entry)
    np.testing.assert_array_equal(logits(lowered_bert.path, entry.parent), expected)
    assert stamp(entry) == before
    assert not caplog.records


def test_generation(lowered_llama: Any, tmp_path: Path, sentences: Any) -> None:
    with load(lowered_llama.path, None) as engine:
        expected = engine.generate(sentences)
    for _ in range(2):
        with load(lowered_llama.path, tmp_path) as engine:
            assert engine.generate(sentences) == expected
    assert len(entries(tmp_path)) == 1


def test_weights_that_cannot_be_mapped(lowered_t5: Any, tmp_path: Path, caplog: Any) -> None:
    """Matrices of 36 columns: ONNX Runtime would crash where the next ones are mapped."""
    with load(lowered_t5.path, None) as engine:
        expected = engine.generate(["rain"])
    with load(lowered_t5.path, tmp_path) as engine:
        assert engine.generate(["rain"]) == expected
    assert "cannot be mapped" in caplog.text
    assert entries(tmp_path) == []


def test_one_entry_for_what_differs(classifier: Any, tmp_path: Path) -> None:
    """Not for the threads, nor the bundle's place; for the provider's options."""
    copy = shutil.copytree(classifier.path, tmp_path / "copy")
    cache = tmp_path / "cache"
    for threads in (1, 2):
        Engine.load(classifier.path, ["cpu"], threads, cache=cache).close()
    Engine.load(copy, ["cpu"], cache=str(cache)).close()
    assert len(entries(cache)) == 1
    options = {"arena_extend_strategy": "kSameAsRequested"}
    Engine.load(classifier.path, [("cpu", options)], cache=cache).close()
    assert len(entries(cache)) == 2


def _truncate(entry: Path) -> None:
    os.truncate(entry / "graph.onnx.data", (entry / "graph.onnx.data").stat().st_size // 2)


def _flip(name: str) -> Callable[[Path], None]:
    def flip(entry: Path) -> None:
        data = bytearray((entry / name).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (entry / name).write_bytes(data)

    return flip


def _swap_for_another(entry: Path) -> None:
    """A graph kept for another CPU, say, under this one's name."""
    data = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps(data | {"identity": "another"}))


def _empty(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": _truncate,
    "a changed weight": _flip("graph.onnx.data"),
    "a changed graph": _flip("graph.onnx"),
    "no weights": lambda entry: (entry / "graph.onnx.data").unlink(),
    "no graph": lambda entry: (entry / "graph.onnx").unlink(),
    "no list": lambda entry: (entry / "entry.json").unlink(),
    "another list": lambda entry: (entry / "entry.json").write_text("[]"),
    "no JSON": lambda entry: (entry / "entry.json").write_bytes(b"\xff"),
    "an empty list": lambda entry: (entry / "entry.json").write_text("{}"),
    "of another": _swap_for_another,
    "empty": _empty,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged(lowered_bert: Any, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """It is made again, and the answers stay what they were."""
    expected = logits(lowered_bert.path, tmp_path)
    (entry,) = entries(tmp_path)
    before = stamp(entry)
    damage(entry)
    np.testing.assert_array_equal(logits(lowered_bert.path, tmp_path), expected)
    assert entries(tmp_path) == [entry]
    mended = stamp(entry)
    assert len(mended) == 3
    assert mended != before
    np.testing.assert_array_equal(logits(lowered_bert.path, tmp_path), expected)
    assert stamp(entry) == mended


def test_touched_but_equal(classifier: Any, tmp_path: Path) -> None:
    """A copy of the cache has other times: its bytes are read, and it is used."""
    logits(classifier.path, tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new", copy_function=shutil.copyfile)
    for path in (tmp_path / "new").rglob("graph*"):
        os.utime(path, (1, 1))
    before = stamp(tmp_path / "new")
    logits(classifier.path, tmp_path / "new")
    assert stamp(tmp_path / "new") == before


def test_unfinished(classifier: Any, tmp_path: Path) -> None:
    """What a killed writer left is not read, and removed once it is old."""
    expected = logits(classifier.path, None)
    fresh, old = tmp_path / ".unfinished-1", tmp_path / ".unfinished-2"
    for folder in (fresh, old):
        folder.mkdir()
        (folder / "graph.onnx").write_bytes(b"half")
    os.utime(old, (1, 1))
    np.testing.assert_array_equal(logits(classifier.path, tmp_path), expected)
    assert fresh.exists()
    assert not old.exists()


def test_a_damaged_bundle_is_not_kept(classifier: Any, tmp_path: Path) -> None:
    """Its sound copy has the same hashes in its manifest, and would get these weights."""
    bundle = shutil.copytree(classifier.path, tmp_path / "bundle")
    weights = bytearray((bundle / "weights.bin").read_bytes())
    weights[5] ^= 0xFF
    (bundle / "weights.bin").write_bytes(weights)
    with pytest.raises(BundleError, match=r"weights\.bin is not what was written"):
        load(bundle, tmp_path / "cache")
    expected = logits(classifier.path, None)
    np.testing.assert_array_equal(logits(classifier.path, tmp_path / "cache"), expected)


def _a_file(cache: Path) -> None:
    cache.write_text("not a folder")


def _open_to_all(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


@pytest.mark.parametrize("prepare", [_a_file, _open_to_all])
def test_no_place(
    classifier: Any, tmp_path: Path, prepare: Callable[[Path], None], caplog: Any
) -> None:
    """The engine loads without, and the log says why."""
    prepare(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        answers = logits(classifier.path, tmp_path / "cache")
    np.testing.assert_array_equal(answers, logits(classifier.path, None))
    assert "loaded without the kept graph" in caplog.text


@pytest.mark.parametrize("what", ["written by others", "a link"])
def test_not_this_users_alone(classifier: Any, tmp_path: Path, what: str, caplog: Any) -> None:
    """A graph that somebody else could have put there is not loaded."""
    cache = tmp_path / "cache"
    expected = logits(classifier.path, cache)
    (entry,) = entries(cache)
    if what == "a link":
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    else:
        entry.chmod(0o777)
    before = stamp(cache)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(logits(classifier.path, cache), expected)
    assert "loaded without the kept graph" in caplog.text
    assert stamp(cache) == before


LIMITED = """
import resource, signal, sys
from eptc.runtime import Engine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
with Engine.load(sys.argv[1], ["cpu"], cache=sys.argv[2]) as engine:
    print(len(engine.classify(["rain"])))
"""


def test_full_disk(classifier: Any, tmp_path: Path) -> None:
    """A file that cannot be written whole leaves nothing, and the engine loads."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(classifier.path), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1\n"
    assert "loaded without the kept graph" in done.stderr
    assert entries(tmp_path) == []


MEMORY = """
import json, sys
import numpy as np
from eptc.runtime import Engine

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024

feeds = {name: np.ones((1, 3), np.int64) for name in
         ("input_ids", "attention_mask", "token_type_ids")}
tiny, large, cache = sys.argv[1:]
Engine.load(tiny, ["cpu"], threads=1).run(feeds)
sizes = [anonymous()]
engines = []
for _ in range(2):
    engines.append(Engine.load(large, ["cpu"], threads=1, cache=cache or False))
    engines[-1].run(feeds)
    sizes.append(anonymous())
print(json.dumps([sizes[1] - sizes[0], sizes[2] - sizes[1]]))
"""
WIDE = 2048
MATRIX = WIDE * WIDE * 4  # bytes


@pytest.fixture
def large(tmp_path: Path, rewrite: Callable[..., Path]) -> Path:
    """A classifier with a matrix of 16 MB."""
    folder = tmp_path / "large"
    folder.mkdir()
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask,
           int64[batch, sequence] token_type_ids) => (float[batch, 3] logits) {
          words = Gather(E, input_ids)
          along = Constant<value_ints = [1]>()
          sum = ReduceSum<keepdims = 0>(words, along)
          wide = MatMul(sum, M)
          logits = MatMul(wide, W)
        }""")
    random = np.random.default_rng(1)
    for name, shape in {"E": (20, WIDE), "M": (WIDE, WIDE), "W": (WIDE, 3)}.items():
        array = random.standard_normal(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="weights.bin"
    )
    return rewrite(folder, "encoder-classifier", num_labels=3)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs /proc")
def test_memory(classifier: Any, large: Path, tmp_path: Path) -> None:
    """Another engine of the process adds nothing; with a cache another process does not either."""

    def grown(cache: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(classifier.path), str(large), cache],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found: list[int] = json.loads(done.stdout)
        return found

    first, second = grown("")
    assert first > 0.9 * MATRIX  # the control: a packed copy in this process's own memory
    assert second < 0.1 * MATRIX
    load(large, tmp_path / "cache").close()
    first, second = grown(str(tmp_path / "cache"))
    assert first < 0.3 * MATRIX  # mapped: shared with every process that maps it
    assert second < 0.1 * MATRIX


def test_two_processes_at_once(lowered_bert: Any, tmp_path: Path) -> None:
    """Whoever is second uses what the first has published."""
    code = (
        "import sys; from eptc.runtime import Engine; import numpy as np; "
        "ones = np.ones((1, 3), np.int64); "
        "engine = Engine.load(sys.argv[1], ['cpu'], threads=1, cache=sys.argv[2]); "
        "print(engine.run({'input_ids': ones, 'attention_mask': ones, 'token_type_ids': ones}))"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(lowered_bert.path), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    outputs = {child.communicate() for child in children}
    assert [child.returncode for child in children] == [0] * 4
    assert len(outputs) == 1
    assert len(entries(tmp_path)) == 1


def test_where_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nowhere unless a caller asks for it."""
    assert kept_in(False) is None
    assert kept_in("there") == Path("there")
    monkeypatch.setenv("EPTC_CACHE_DIR", "/var/kept")
    assert kept_in(True) == Path("/var/kept")
    monkeypatch.setenv("EPTC_CACHE_DIR", "")
    assert kept_in(True) is None
