"""What a page says, and that a failing bundle has one as well."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import safetensors.numpy

import eptc
from eptc.errors import BundleError, MissingExtraError, OutputError, ParityError
from eptc.lower.weights import STACKED
from eptc.passes.fold_transposes import FoldTransposes
from eptc.runtime.seal import sealed

QUERY = "bert.encoder.layer.0.attention.self.query"
GELU = "bert.encoder.layer.0.intermediate.intermediate_act_fn"


class Page(html.parser.HTMLParser):
    """The tables of a page by their ids, and every element's name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._rows: list[list[str]] = []
        self._cell = False
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        if tag == "table":
            self._rows = self.tables[str(dict(attrs)["id"])] = []
        elif tag == "tr":
            self._rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self._rows[-1][-1] += data


def test_a_good_bundle(good_page: tuple[Path, Any], tone: Path) -> None:
    path, content = good_page
    assert content.passed
    assert content.divergence is None
    page, built = Page(path), json.loads((tone / "parity.json").read_text())
    assert "Passed: " in page.text
    assert "First divergence" not in page.text
    assert set(page.tables) == {
        "checks", "layers", "tensors", "passes", "routes-0", "routes-1", "routes-2", "files",
    }  # fmt: skip
    # The numbers are those the build wrote down.
    outputs = {row[0]: row for row in page.tables["tensors"][1:]}
    for entry in built["tensors"]:
        assert float(outputs[entry["what"]][2]) == entry["error"]
        assert float(outputs[entry["what"]][3]) == entry["bound"]
    manifest = json.loads((tone / "manifest.json").read_text())
    passes = page.tables["passes"][1:]
    assert [row[1] for row in passes] == [record["name"] for record in manifest["passes"]]
    assert [row[5] for row in passes if row[1] == "fold-pyramid"] == ["250.0 ms"]
    assert {row[5] for row in passes if row[1] != "fold-pyramid"} == {"not recorded"}
    layers = [row[1] for row in page.tables["layers"][1:]]
    assert {QUERY, GELU, "classifier"} <= set(layers)
    assert layers.index(QUERY) < layers.index(GELU) < layers.index("classifier")
    assert {row[7] for row in page.tables["layers"][1:]} == {"passed"}


def test_routes_are_the_checkpoint_s(good_page: tuple[Path, Any], small_native: Any) -> None:
    page = Page(good_page[0])
    inspected = eptc.inspect(small_native.ckpt, base=small_native.base)
    for number, routes in enumerate(inspected["routes"].values()):
        heads, *rows = page.tables[f"routes-{number}"]
        assert heads == ["linear", *(f"expert {e} ({k})" for e, k in enumerate((2, 3, 4, 7))),
                         "margin"]  # fmt: skip
        shown = {row[0]: row[1:-1] for row in rows}
        for path, route in routes.items():
            used = dict(zip(route["experts"], route["weights"], strict=True))
            assert shown[path] == [f"{used[e]:.3f}" if e in used else "" for e in range(4)]


def test_a_damaged_bundle(bad_page: tuple[Path, Any]) -> None:
    """The layer whose weight it is; no pass, since a new build is sound."""
    path, content = bad_page
    assert not content.passed
    assert content.divergence.layer.layer == QUERY
    assert content.divergence.step.endswith(
        "after every pass: none is to blame; weights.bin was changed after the build"
    )
    page = Page(path)
    assert "Failed: " in page.text
    assert QUERY in page.text[page.text.index("First divergence") :][:400]
    rows = page.tables["layers"][1:]
    first = next(i for i, row in enumerate(rows) if row[7] == "failed")
    assert rows[first][1] == QUERY
    assert rows[-1][1] == "classifier"
    assert rows[-1][7] == "failed"


def test_a_graph_that_was_changed(page: Callable[..., Any], tone: Path, tmp_path: Path) -> None:
    """Another activation, with the hash to go with it: the layer is named, and the file."""
    import hashlib

    copy = Path(shutil.copytree(tone, tmp_path / "tone"))
    graph = onnx.load(copy / "model.onnx", load_external_data=False)
    (node,) = [node for node in graph.graph.node if node.name == f"{GELU}/Gelu"]
    node.op_type = "Relu"
    del node.attribute[:]
    onnx.save(graph, copy / "model.onnx")
    data = (copy / "model.onnx").read_bytes()
    manifest = json.loads((copy / "manifest.json").read_text())
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["model.onnx"] = record
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    _, content = page(copy)
    assert content.divergence.layer.layer == GELU
    assert content.divergence.step.endswith("model.onnx is another than such a build writes")
    with pytest.raises(ParityError, match="tensors shortest text alone: 1 of 1 output"):
        content.checked()


def break_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pass change an activation."""
    sound = FoldTransposes.rewrite

    def broken(self: FoldTransposes, model: onnx_ir.Model) -> int:
        changed = sound(self, model)
        for node in model.graph:
            if (node.name or "").startswith(GELU):
                node.op_type = "Relu"
                node.attributes.clear()
        return changed

    monkeypatch.setattr(FoldTransposes, "rewrite", broken)


def test_a_pass_that_is_wrong(
    page: Callable[..., Any], small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built without a check; the page names the pass and the layer."""
    break_a_pass(monkeypatch)
    out = tmp_path / "tone"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out, verify=False)
    _, content = page(out)
    assert content.divergence.layer.layer == GELU
    assert "compiled once more, it fails as well: the pass fold-transposes" in (
        content.divergence.step
    )


def test_the_label_order(page: Callable[..., Any], tone: Path, tmp_path: Path) -> None:
    """No layer is off: what the engine answers is right, what it is called is not."""
    copy = Path(shutil.copytree(tone, tmp_path / "tone"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["task"]["labels"].reverse()
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    path, content = page(copy)
    assert [outcome.name for outcome in content.failed] == ["interface"]
    assert content.divergence.layer is None
    assert "manifest.json was changed after it" in content.divergence.step
    assert "Every layer that has a counterpart agrees" in path.read_text()


def test_another_checkpoint(page: Callable[..., Any], tone: Path, small_routed: Any) -> None:
    """Bad input stays bad input; the page says what it is."""
    path, content = page(tone, reference=small_routed.ckpt, base=small_routed.base)
    assert "was made from another checkpoint" in path.read_text()
    with pytest.raises(BundleError, match="was made from another checkpoint"):
        content.checked()


def test_a_manifest_nobody_can_read(page: Callable[..., Any], tone: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tone, tmp_path / "tone"))
    (copy / "manifest.json").write_text("[")
    path, content = page(copy)
    assert "Failed: manifest" in path.read_text()
    with pytest.raises(BundleError, match="is not JSON"):
        content.checked()


def test_a_lower_precision(
    page: Callable[..., Any], small_native: Any, small_rows: Any, tmp_path: Path
) -> None:
    """The plan, the comparison beside it and the score on data are there."""
    out = tmp_path / "int8"
    eptc.export(
        small_native.ckpt, base=small_native.base, task="score", out=out, precision="int8-weights"
    )
    rows = [{"precision": p, "refused": None, "bundle_bytes": 2000 // i, "milliseconds": 1.0 / i,
             "score": 0.9 - i / 100, "drop": 0.1, "flips": None}
            for i, p in enumerate(("fp32", "int8"), 1)]  # fmt: skip
    (tmp_path / "comparison.json").write_text(
        json.dumps({"metric": "pearson", "examples": 120, "rows": rows})
    )
    path, content = page(out, data=small_rows.values)
    assert content.passed
    assert content.checked().scores["rows"] == 120
    shown, plan = Page(path), json.loads((out / "precision.json").read_text())["weights"]
    assert {row[0]: row[1] for row in shown.tables["plan"][1:]} == plan
    assert [row[0] for row in shown.tables["comparison"][1:]] == ["fp32", "int8"]
    assert 'id="by-size-title"' in shown.text
    assert 'id="by-time-title"' in shown.text


def test_block_by_block(
    page: Callable[..., Any], tone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eptc.pair.available_memory", lambda: 2**10)
    path, content = page(tone)
    assert content.passed
    assert content.checked().mode == "block by block"
    assert any("bert.encoder.layer.0" in row[0] for row in Page(path).tables["tensors"])


def test_an_encoder_and_a_decoder(page: Callable[..., Any], golden: Path, tmp_path: Path) -> None:
    """Both graphs' layers stand beside the reference's, and all agree."""
    folder = golden / "ept" / "t5-tiny"
    meta = json.loads((folder / "meta.json").read_text())
    given = {"base": folder / "base", "tasks": meta["tasks"], "top_k": meta["moe_top_k"]}
    eptc.export(folder / "adapter", task=0, out=tmp_path / "t5", **given)
    path, content = page(tmp_path / "t5", reference=folder / "adapter", base=folder / "base")
    assert content.passed
    rows = Page(path).tables["layers"][1:]
    assert {row[2] for row in rows} == {"encoder", "decoder"}
    assert {row[7] for row in rows} == {"passed"}
    assert {row[1] for row in rows if row[3]} >= set(content.routes.linears)


def test_names_from_a_checkpoint_are_text(
    page: Callable[..., Any], copy_native: Any, tmp_path: Path
) -> None:
    """Markup in the names of tasks and labels is shown, not obeyed."""
    hostile = "</title><script>alert('x')</script><img src=x onerror=alert(1)>"
    config = json.loads((copy_native.ckpt / "ept_config.json").read_text())
    config["tasks"][0] |= {"name": hostile, "labels": ["<b>bad</b>", '"><svg onload=alert(2)>']}
    (copy_native.ckpt / "ept_config.json").write_text(json.dumps(config))
    weights = copy_native.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    renamed = {
        name.replace("heads.tone.", f"heads.{hostile}."): array for name, array in tensors.items()
    }
    safetensors.numpy.save_file(renamed, weights)
    out = tmp_path / "hostile"
    eptc.export(copy_native.ckpt, base=copy_native.base, task=0, out=out)
    path, _ = page(out, reference=copy_native.ckpt, base=copy_native.base)
    shown = Page(path)
    assert shown.elements.count("script") == 1
    assert not {"img", "b"} & set(shown.elements)
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(&#39;x&#39;)" in shown.text


def test_nothing_is_loaded_from_elsewhere(good_page: tuple[Path, Any]) -> None:
    shown = Page(good_page[0])
    links = [
        value
        for name, value in shown.attributes
        if name in ("src", "href", "xlink:href", "action")
    ]
    assert all(value and value.startswith(("#", "data:,")) for value in links)
    assert not re.search(r"https?://|@import|url\(", shown.text)


def test_jinja2_is_missing(
    tone: Path, tmp_path: Path, small_native: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is compared."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "jinja2" else find(name)
    )
    with pytest.raises(MissingExtraError, match=r"ept-compiler\[report\]"):
        eptc.report(tone, out=tmp_path / "r.html", reference=small_native.ckpt)


@pytest.mark.parametrize("place", [".", "nowhere/report.html"])
def test_a_place_that_cannot_be_written(
    tone: Path, tmp_path: Path, small_native: Any, place: str
) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        eptc.report(tone, out=tmp_path / place, reference=small_native.ckpt)


def test_the_command(
    cli: Callable[..., Any], small_native: Any, tone: Path, damaged: Path, tmp_path: Path
) -> None:
    """It ends as without the page: 0, 1 where parity fails; the page is there either way."""
    given = ("--reference", small_native.ckpt, "--base", small_native.base)
    plain = cli("parity", tone, *given)
    done = cli("parity", tone, *given, "--report", tmp_path / "good.html")
    assert done.code == 0
    assert done.stdout == plain.stdout
    done = cli("parity", damaged, *given, "--report", tmp_path / "bad.html", "--json")
    assert done.code == 1
    assert f"the weight {QUERY}.weight" in done.json["error"]
    assert "Failed: " in (tmp_path / "bad.html").read_text()


def test_the_command_that_builds(
    cli: Callable[..., Any], small_native: Any, tmp_path: Path
) -> None:
    given = ("--base", small_native.base, "--task", "tone", "-o", tmp_path / "tone")
    done = cli("export", small_native.ckpt, *given, "--report", tmp_path / "r.html", "--json")
    assert done.code == 0
    seconds = {record["name"]: record["seconds"] for record in done.json["passes"]}
    rows = Page(tmp_path / "r.html").tables["passes"][1:]
    assert {row[1]: row[5] for row in rows} == {
        name: f"{1000 * taken:.1f} ms" for name, taken in seconds.items()
    }
    done = cli("export", small_native.ckpt, *given, "--report", tmp_path / "r.html", "--dry-run")
    assert done.code == 2
    assert "--report is about an engine" in done.stderr


def test_several_tasks(page: Callable[..., Any], several: Path, small_native: Any) -> None:
    """Each task's outputs, and those of batches of several, as the build found them."""
    path, content = page(several)
    assert content.passed
    written, built = Page(path), json.loads((several / "parity.json").read_text())
    names = [task["name"] for task in json.loads((several / "manifest.json").read_text())["tasks"]]
    assert f"<h1>{', '.join(names)}</h1>" in written.text
    outputs = {row[0]: row for row in written.tables["tensors"][1:]}
    parts = [*built["tasks"].items(), ("side by side", built["mixed"])]
    wanted = {
        f"{part}: {e['what']}": e["error"] for part, found in parts for e in found["tensors"]
    }
    assert {what: float(row[2]) for what, row in outputs.items()} == wanted
    checks = {(row[0], row[1]) for row in written.tables["checks"][1:] if row[2] == "passed"}
    assert {("interface", name) for name in names} <= checks
    assert ("task ids", "") in checks
    adapted = {row[1] for row in written.tables["layers"][1:] if row[3] == "adapted"}
    assert adapted == set(content.routes.linears)
    plain = eptc.parity(several, reference=small_native.ckpt, base=small_native.base)
    assert content.checked().summary() == plain.summary()


def test_factors_of_another_task(page: Callable[..., Any], several: Path, tmp_path: Path) -> None:
    """The rows of one linear's factors change places: task, layer and file are named."""
    copy = Path(shutil.copytree(several, tmp_path / "all"))
    graph = onnx_ir.load(copy / "model.onnx").graph
    (name,) = [name for name in graph.initializers if name.startswith(f"{QUERY}{STACKED}B")]
    tensor = graph.initializers[name].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.offset is not None
    rows = tensor.numpy()[[1, 0, *range(2, tensor.shape.numpy()[0])]]
    data = bytearray((copy / "weights.bin").read_bytes())
    data[tensor.offset : tensor.offset + rows.nbytes] = rows.tobytes()
    (copy / "weights.bin").write_bytes(bytes(data))
    _, content = page(copy)
    failed = {(outcome.name, outcome.part) for outcome in content.failed}
    names = [task.name for task in content.manifest.tasks]
    assert {
        ("tensors", names[0]),
        ("tensors", names[1]),
        ("tensors", "tasks side by side"),
    } <= failed
    assert ("tensors", names[2]) not in failed
    assert content.divergence.layer.layer == QUERY
    assert content.divergence.probe.startswith(f"{names[0]}: ")
    assert content.divergence.step.endswith("weights.bin was changed after the build")
    with pytest.raises(ParityError, match="checks failed"):
        content.checked()


def test_a_build_that_fails_has_a_page(
    cli: Any, small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is published, and the page names the layer and the pass."""
    break_a_pass(monkeypatch)
    given = ("--base", small_native.base, "--task", "tone", "-o", tmp_path / "tone")
    done = cli("export", small_native.ckpt, *given, "--report", tmp_path / "r.html")
    assert done.code == 1
    assert "fold-transposes" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    text = (tmp_path / "r.html").read_text()
    assert "Failed: " in text
    assert GELU in text[text.index("First divergence") :][:400]
    assert "the pass fold-transposes" in text
    assert "from tone." in text


def _in_the_bundle(bundle: Path, _: Path) -> Path:
    return bundle / "report.html"


def _a_file_of_the_bundle(bundle: Path, root: Path) -> Path:
    (root / "link").symlink_to(bundle)
    return root / "link" / "manifest.json"


def _no_page(_: Path, root: Path) -> Path:
    (root / "rows.jsonl").write_text('{"text": "film"}\n')
    return root / "rows.jsonl"


def _a_circle(_: Path, root: Path) -> Path:
    (root / "circle").symlink_to("circle")
    return root / "circle" / "report.html"


LOSSES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "in the bundle": (_in_the_bundle, "would be in the bundle"),
    "a file of the bundle": (_a_file_of_the_bundle, "would be in the bundle"),
    "no page": (_no_page, "would replace a file that is no page"),
    "a device": (lambda *_: Path("/dev/null"), "cannot be written"),
    "a circle": (_a_circle, "cannot be written"),
    "a long name": (lambda _, root: root / f"{'x' * 300}.html", "cannot be written"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_nothing_else_is_lost(
    tone: Path, tmp_path: Path, small_native: Any, cli: Any, case: str
) -> None:
    """Said before anything is compared, or built."""
    make, words = LOSSES[case]
    place = make(tone, tmp_path)
    before = {path: path.read_bytes() for path in (*tone.iterdir(), *tmp_path.glob("*.jsonl"))}
    with pytest.raises(OutputError, match=words):
        eptc.report(tone, out=place, reference=small_native.ckpt)
    if case != "a device":
        out = tmp_path / "new"
        given = (small_native.ckpt, "--base", small_native.base, "--task", "tone")
        done = cli("export", *given, "-o", out, "--report", out if place.parent == tone else place)
        assert done.code == 2, done
        assert not out.exists()
    assert before == {
        path: path.read_bytes() for path in (*tone.iterdir(), *tmp_path.glob("*.jsonl"))
    }
    assert not Path("/dev/null").is_file()


def test_a_page_that_is_there_is_replaced_whole(
    page: Callable[..., Any], tone: Path, small_native: Any, small_disk: Callable[[int], Path]
) -> None:
    """Where there is no room the old one stays, and nothing beside it."""
    disk = small_disk(8)
    old, _ = page(tone)
    text = "<!doctype html>\n<title>before</title>\n"
    (disk / "report.html").write_text(text)
    with pytest.raises(OutputError, match="No space left on device"):
        eptc.report(
            tone, out=disk / "report.html", reference=small_native.ckpt, base=small_native.base
        )
    assert [path.name for path in disk.iterdir()] == ["report.html"]
    assert (disk / "report.html").read_text() == text
    shutil.copy(old, disk.parent / "report.html")
    eptc.report(
        tone, out=disk.parent / "report.html", reference=small_native.ckpt, base=small_native.base
    )
