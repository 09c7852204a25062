"""The benchmark of routed experts: it runs, compares before it times, and says what it found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks import routing
from benchmarks.models import MODELS, write_base
from benchmarks.routed_checkpoints import VARIANTS
from eptc import checkpoint

SMALL = {
    "bert": MODELS["tiny-bert"],
    "t5": MODELS["tiny-t5"],
    "deberta-v2": dataclasses.replace(
        MODELS["deberta-v3-base"],
        config={
            **MODELS["deberta-v3-base"].config, "vocab_size": 64, "hidden_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "system", "graphs"),
    [
        ("tiny-bert", "ept-shared", {"model"}),
        ("tiny-t5", "ept-per-linear", {"encoder", "decoder"}),
        ("tiny-bert", "tucka-per-sample", {"model"}),
        ("tiny-t5", "mept-half-top2-batch", {"encoder", "decoder"}),
        ("tiny-t5", "smop-batch", {"encoder", "decoder"}),
    ],
)
def test_a_tiny_model(
    model: str, system: str, graphs: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three contestants of one model give one answer; both overheads are measured."""
    options = ["--models", model, "--systems", system, "--rounds", "1", "--threads", "1"]
    routing.main([*options, "--folder", str(tmp_path), "--results", str(tmp_path / "results")])

    printed = capsys.readouterr().out
    assert f"{system} on {model}, " in printed
    found = json.loads((tmp_path / "results" / "routing" / f"{model}-{system}.json").read_text())
    assert {case["graph"] for case in found["cases"]} == graphs
    for case in found["cases"]:
        assert f"{case['graph']:8} {case['batch']:2} x {case['sequence']:<3}" in printed
        assert case["exported_off_by"] < 1e-4
        assert case["overhead_to_exported"] is None, "of one round nothing is known"
        assert case["milliseconds"].keys() == {routing.BASE, routing.ENGINE, routing.EXPORTED}
    place = tmp_path / "routing" / model
    first = "model" if "model" in graphs else "encoder"
    assert not routed(place / "plain" / f"{first}.onnx")
    assert routed(place / system / "engine" / f"{first}.onnx")


def routed(path: Path) -> list[str]:
    """Return the weights of a graph that no base has."""
    graph = onnx.load(path, load_external_data=False).graph
    parts = (".branch.", ".router.", ".prompts.")
    return [t.name for t in graph.initializer if any(part in t.name for part in parts)]


# The mode that the reader finds in each variant's checkpoint, and what else it must know of it.
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "ept-per-linear": ("token", {}),
    "ept-shared": ("token", {}),
    "tucka-batch": ("batch", {"r": 8, "k": 2, "t": 2, "p": 2, "inert": []}),
    "tucka-per-sample": ("per-sample", {}),
    "mept-top1-batch": ("batch", {"top_k": 1, "layers": [0, 1], "input_level": False}),
    "mept-top1-per-sample": ("per-sample", {"top_k": 1, "layers": [0, 1]}),
    "mept-top2": ("per-sample", {"top_k": 2, "virtual_tokens": 10, "experts": 4, "shared": True}),
    "mept-half-top1-batch": ("batch", {"top_k": 1, "layers": [1], "input_level": True}),
    "mept-half-top1-per-sample": ("per-sample", {"top_k": 1, "layers": [1]}),
    # Two experts a row, and still mixed: where a batch has as many rows as a row has prompts.
    "mept-half-top2-batch": ("batch", {"top_k": 2, "layers": [1]}),
    "smop-batch": ("batch", {"method": "prompt-routing", "layers": [], "shared": False}),
    "smop-per-sample": ("per-sample", {"method": "prompt-routing", "top_k": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_checkpoint_is_what_its_name_says(variant: Any, tmp_path: Path) -> None:
    mode, wanted = READ[variant.name]
    for kind in variant.model_types:
        base, folder = tmp_path / kind / "base", tmp_path / kind / "checkpoint"
        write_base(SMALL[kind], base)
        variant.write(base, folder)

        contents = checkpoint.read(folder, base, routing=variant.routing).contents

        assert contents.routing.mode == mode
        details = {k: v for part in contents.details.values() for k, v in part.items()}
        assert {key: details[key] for key in wanted} == wanted


def test_names_choose_all_that_begin_so() -> None:
    def chosen(systems: str, models: str) -> list[tuple[str, str]]:
        found = routing.pairs(models.split(","), systems.split(","))
        return [(model, variant.name) for model, variant in found]

    assert chosen("smop,tucka-batch,mept-top1", "t5-base,minilm,deberta-v3-base") == [
        ("t5-base", "mept-top1-batch"),
        ("t5-base", "mept-top1-per-sample"),
        ("t5-base", "smop-batch"),
        ("t5-base", "smop-per-sample"),
        ("minilm", "tucka-batch"),
        ("deberta-v3-base", "tucka-batch"),
    ]
    assert chosen("mept-top", "t5-base") == []


def test_a_system_without_a_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        routing.main(["--systems", "mept", "--models", "minilm"])
    assert "no system of mept runs on minilm" in capsys.readouterr().err


def test_what_was_written_half_is_written_again(tmp_path: Path) -> None:
    calls = []

    def write(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "one").touch()
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        routing.once(tmp_path / "made", write)
    assert not (tmp_path / "made").exists()
    for _ in range(2):
        routing.once(tmp_path / "made", write)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "one"]
