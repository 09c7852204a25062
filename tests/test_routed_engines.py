"""Engines of checkpoints that route by token: exact, frozen, in fewer bits."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import eptc
from eptc import checkpoint, recheck
from eptc.errors import OptionError, ParityError
from eptc.nn import EptConfig, EptModel, GateConfig, load_base, load_reference
from eptc.parity_gate import builtin_examples
from eptc.parity_gate.reference import stream_reference
from eptc.runtime import Engine, load_manifest
from eptc.tasks import Task

WORDS = ("a", "and", "bad", "dull", "film", "good", "long", "not", "the", "very", "was")


def test_every_task_has_its_own_routes(small_routed: Any, tmp_path: Path) -> None:
    """Verified, and beside the reference on batches the build did not see."""
    reference = load_reference(small_routed.ckpt, small_routed.base)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 17, (3, 11), dtype=np.int64)
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    answers = {}
    for task in reference.tasks:
        out = tmp_path / task.name
        built = eptc.export(small_routed.ckpt, base=small_routed.base, task=task.name, out=out)
        assert built.manifest.parity["passed"]
        assert built.manifest.routing.mode == "token"
        with built.load(providers=["cpu"]) as engine:
            types = np.zeros_like(ids)
            feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
            got = engine.run(feeds)["logits"]
            alone = engine.run({name: array[1:2, :7] for name, array in feeds.items()})["logits"]
        with torch.no_grad(), reference.task(task.name):
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            want = reference.hf(**tensors).logits.numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * max(1, np.abs(want).max()))
        # Neither its neighbours nor padding change a row's answer.
        np.testing.assert_allclose(alone, got[1:2], rtol=0, atol=1e-4)
        answers[task.name] = got
    assert not np.allclose(answers["tone"], answers["same"], atol=1e-2)


def _t5(root: Path, router_input: str, **options: Any) -> tuple[Path, Path]:
    """Write a tiny T5 with routed experts; nothing is zero."""
    config = transformers.T5Config(
        vocab_size=40, d_model=34, d_kv=8, d_ff=51, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(config).save_pretrained(root / "base")
    model = EptModel.attach(
        load_base(root / "base"),
        EptConfig(
            variant="paper",
            targets=("q", "k", "v", "o", "wi", "wo"),
            kernel_sizes=(2, 3, 4, 2, 24, 24),
            top_k=2,
            rank=3,
            tasks=(Task("one", "generation"), Task("two", "generation")),
            gate=GateConfig(router_input, 1.0),  # type: ignore[arg-type]
            **options,
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            std = 0.1 if "kernels" in name else 0.3
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    model.save(root / "ckpt", base_dir=root / "base")
    return root / "ckpt", root / "base"


@pytest.mark.parametrize(
    ("router_input", "options"),
    [("token", {}), ("token+task", {"sharing": "model"})],
)
def test_an_encoder_and_a_decoder(
    tmp_path: Path, router_input: str, options: dict[str, Any]
) -> None:
    """Cross attention's keys, the decoder at once, in pieces and a token at a time."""
    ckpt, base = _t5(tmp_path, router_input, **options)
    built = eptc.export(ckpt, base=base, task="two", out=tmp_path / "out")
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    kinds = {entry["what"].partition(",")[0] for entry in parity["tensors"]}
    assert {"encoder state", "logits at once", "logits in pieces", "logits with cache"} <= kinds
    assert built.manifest.parity["passed"]
    assert built.manifest.parity["decisions"] > 20


def _rows(path: Path, labels: list[Any], texts: list[str]) -> Path:
    lines = (json.dumps({"text": t, "label": y}) for t, y in zip(texts, labels, strict=True))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@dataclasses.dataclass(frozen=True)
class Data:
    """Texts of the small routed checkpoint, labelled with what routing engines answer."""

    file: Path
    texts: list[str]


@pytest.fixture(scope="module")
def data(small_routed: Any, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(3, 12))) for _ in range(120)]
    built = eptc.export(
        small_routed.ckpt, base=small_routed.base, task="score", out=folder / "exact", verify=False
    )
    with built.load(providers=["cpu"]) as engine:
        values = [answer.value for answer in engine.classify(texts)]
    return Data(_rows(folder / "rows.jsonl", values, texts), texts)


def _export(small: Any, out: Path, **options: Any) -> eptc.Bundle:
    built: eptc.Bundle
    built = eptc.export(small.ckpt, base=small.base, task="score", out=out, **options)
    return built


def test_frozen_routes(small_routed: Any, data: Data, tmp_path: Path) -> None:
    """A plain engine; proven under its constant gates, scored beside the one that routes."""
    built = _export(
        small_routed, tmp_path / "out", routing="frozen", calibration=data.file, data=data.file,
        max_drop=90,
    )  # fmt: skip
    manifest = built.manifest
    assert manifest.routing.mode == "frozen"
    assert manifest.parity["passed"]
    assert "gates replaced" in manifest.parity["reference"]
    assert 0 < manifest.parity["scores"]["drop"] < 0.9
    (record,) = [p for p in manifest.passes if p["name"] == "freeze-router"]
    assert record["contract"] == "lossy"
    assert record["options"]["gates"].keys() == record["options"]["spread"].keys()
    assert all(sum(g) == pytest.approx(1, abs=1e-4) for g in record["options"]["gates"].values())
    assert any("standard deviation" in note for note in built.warnings)
    assert any("held-out" in note for note in built.warnings)  # the same file twice
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()]
    static = _export(small_routed, tmp_path / "exact", verify=False)
    assert "TopK" in str((tmp_path / "exact" / "model.onnx").read_bytes())
    assert "TopK" not in str((tmp_path / "out" / "model.onnx").read_bytes())
    assert static.manifest.routing.mode == "token"
    # Compared again, later, it is the same engine within the same budget.
    report = recheck.parity(
        tmp_path / "out", reference=small_routed.ckpt, base=small_routed.base, data=data.file
    )
    assert report.passed
    assert report.scores is not None
    assert report.scores["drop"] == pytest.approx(manifest.parity["scores"]["drop"], abs=1e-3)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("calibrated", [True, False])
def test_what_freezing_changes_is_said_without_labels(
    small_routed: Any, data: Data, tmp_path: Path, cli: Any, verify: bool, calibrated: bool
) -> None:
    """Under its own constant gates nothing flips; beside the routes that it replaced, much may."""
    place = ("--base", small_routed.base, "--task", "same", "-o", tmp_path / "out")
    pairs = [
        dict(zip(("first", "second"), p, strict=True)) for p in itertools.pairwise(data.texts)
    ]
    said = cli(
        "export", small_routed.ckpt, *place, "--routing", "frozen",
        *(("--calibration", _unlabelled(tmp_path, pairs)) if calibrated else ()),
        *(() if verify else ("--no-verify",)),
    )  # fmt: skip
    assert said.code == 0, said.stderr
    exact = eptc.export(
        small_routed.ckpt, base=small_routed.base, task="same", out=tmp_path / "exact",
        verify=False,
    )  # fmt: skip
    task = exact.manifest.task
    assert task is not None
    texts = pairs if calibrated else builtin_examples(task)
    chosen = []
    for folder in ("exact", "out"):
        with Engine.load(tmp_path / folder, providers=["cpu"]) as engine:
            chosen.append([answer.index for answer in engine.classify(texts, truncate=True)])
    flips = sum(a != b for a, b in zip(*chosen, strict=True))
    called = "the calibration text" if calibrated else "the built-in sentences"
    parity = load_manifest(tmp_path / "out").parity
    assert parity["frozen"].items() >= {"text": called, "rows": len(texts), "flips": flips}.items()
    assert parity["frozen"]["error"] > 0
    assert 0 < parity["frozen"]["cosine"] < 1
    if calibrated:
        assert flips > 0
    line = f"beside the model that routes: {flips} of {len(texts)} answers change on {called}"
    for shown in (said.stdout, said.stderr, cli("inspect", tmp_path / "out").stdout):
        assert line in shown
    assert "no measure on held-out data" in said.stderr
    assert ("nor is it the task's own text" in said.stderr) is not calibrated
    shown = cli("inspect", tmp_path / "out").stdout
    assert "thrown away: a standard deviation of " in shown
    assert "gates=" not in shown
    assert max(map(len, shown.splitlines())) < 400
    if verify:
        assert "parity passed under the same constant gates" in said.stdout
        written = json.loads((tmp_path / "out" / "parity.json").read_text())
        assert written["frozen"] == parity["frozen"]


def _unlabelled(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_held_out_data_are_a_measure(small_routed: Any, data: Data, tmp_path: Path) -> None:
    others = [{"text": f"{text} film"} for text in data.texts if f"{text} film" not in data.texts]
    built = _export(
        small_routed, tmp_path / "out", routing="frozen", data=data.file, max_drop=90,
        calibration=_unlabelled(tmp_path, others),
    )  # fmt: skip
    assert not any("held-out" in note for note in built.warnings)
    assert built.manifest.parity["frozen"]["flips"] is None  # of a regression
    assert built.manifest.parity["frozen"]["error"] > 0


def test_frozen_routes_beyond_the_budget(small_routed: Any, data: Data, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="frozen routes: the pearson drops by"):
        _export(small_routed, tmp_path / "out", routing="frozen", data=data.file, max_drop=0.5)
    assert not (tmp_path / "out").exists()


def test_a_frozen_engine_on_other_data(small_routed: Any, data: Data, tmp_path: Path) -> None:
    """What loses is the routes, not the precision, and that is what the message says."""
    _export(small_routed, tmp_path / "out", routing="frozen", calibration=data.file)
    with pytest.raises(ParityError, match="pearson drops by") as raised:
        recheck.parity(
            tmp_path / "out", reference=small_routed.ckpt, base=small_routed.base, data=data.file
        )
    assert "--routing exact" in str(raised.value.fix)
    assert "--max-drop" in str(raised.value.fix)
    assert "precision" not in str(raised.value.fix)


def test_gates_are_seen_on_text(small_routed: Any, tmp_path: Path) -> None:
    """Without a tokenizer there is none: refused before anything is built."""
    shutil.copytree(small_routed.base, tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    for ask in (eptc.plan, functools.partial(eptc.export, out=tmp_path / "out")):
        with pytest.raises(OptionError, match="has a tokenizer"):
            ask(small_routed.ckpt, base=tmp_path / "base", task="score", routing="frozen")


def test_frozen_and_in_fewer_bits(small_routed: Any, data: Data, tmp_path: Path) -> None:
    """What both lose together is measured against the engine that routes in float32."""
    options: dict[str, Any] = {"data": data.file, "max_drop": 90.0, "precision": "int8"}
    both = _export(small_routed, tmp_path / "both", routing="frozen", **options)
    assert both.manifest.parity["scores"]["drop"] > 0.05
    assert both.manifest.routing.mode == "frozen"


def test_routed_in_fewer_bits(small_routed: Any, data: Data, tmp_path: Path) -> None:
    """The base's matrices become integers, routers and experts do not."""
    built = _export(
        small_routed, tmp_path / "out", precision="int8", data=data.file, max_drop=20.0
    )
    stored = json.loads((tmp_path / "out" / "precision.json").read_text())["weights"]
    beside = {name: level for name, level in stored.items() if ".branch." in name}
    assert set(beside.values()) == {"fp32"}
    assert stored["bert.encoder.layer.0.attention.self.query.weight"] == "int8"
    assert len(beside) > 20
    assert built.manifest.parity["scores"]["drop"] < 0.2


def test_inspect_shows_no_routes_where_the_input_decides(small_routed: Any, cli: Any) -> None:
    shown = cli("inspect", small_routed.ckpt, "--base", small_routed.base).stdout
    assert "each token is routed by itself" in shown
    assert "linear" not in shown.rpartition("looks trained")[2]
    assert "query" not in shown


def test_nothing_to_freeze(small_native: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="routers read the task"):
        eptc.export(
            small_native.ckpt, base=small_native.base, task="tone", out=tmp_path / "out",
            routing="frozen",
        )  # fmt: skip


def test_the_same_bytes_twice(small_routed: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _export(small_routed, tmp_path / name, verify=False)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("part", ["router.weight", "task_embedding", "kernels.1", "kernels.3"])
def test_a_reader_that_is_wrong_is_found_out(
    small_routed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The engine is compared with code that reads the checkpoint for itself."""
    from eptc.checkpoint.contents import Source

    take = Source.take

    def swapped(self: Source, name: str, shape: tuple[int | None, ...]) -> Any:
        found = take(self, name, shape)
        if name == f"bert.encoder.layer.0.attention.self.query.ept.{part}":
            array = np.flip(found.numpy(), 0).copy()
            object.__setattr__(found, "numpy", lambda: array)
        return found

    monkeypatch.setattr(Source, "take", swapped)
    with pytest.raises(ParityError):
        _export(small_routed, tmp_path / "out")


def test_larger_than_memory_is_refused(small_routed: Any) -> None:
    """A choice within rounding is seen over a whole model, not in one block of it."""
    source = checkpoint.read(small_routed.ckpt, small_routed.base)
    with pytest.raises(OptionError, match="verified as a whole model"):
        stream_reference(source)
