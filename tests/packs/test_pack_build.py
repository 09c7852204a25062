"""Building a pack: what is in it, what is refused, and that faults never get published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc import pack_graphs
from eptc.errors import CheckpointError, OptionError, ParityError
from eptc.pack_graphs import PackGraphs
from eptc.pack_task import adapter_file, task_tensors
from eptc.runtime import LinearSpec, read_pack
from eptc.runtime.pack_tensors import factor_names
from tests.conftest import Folders, Outcome
from tests.packs.conftest import TEXTS, Packed

Cli = Callable[..., Outcome]


def _build(folders: Folders, out: Path, **options: Any) -> Any:
    options = {"base": folders.base, "task": "all", "layout": "pack", **options}
    return eptc.export(folders.ckpt, out=out, **options)


def test_two_builds_are_equal_to_the_byte(
    packed: Packed, small_native: Folders, tmp_path: Path
) -> None:
    again = Packed(tmp_path / "again", small_native)
    _build(small_native, again.path, task=["tone", "score"])
    assert again.digests() == packed.digests()
    assert sorted(again.digests()) == [
        "config.json", "folded.model.onnx", "model.onnx", "pack.json", "score.onnx_adapter",
        "tokenizer.json", "tokenizer_config.json", "tone.onnx_adapter", "weights.bin",
    ]  # fmt: skip


def test_the_base_is_there_once(built_pack: Path, alone: Callable[[str], Path]) -> None:
    base = (alone("tone") / "weights.bin").stat().st_size
    assert (built_pack / "weights.bin").stat().st_size <= 1.02 * base


def test_what_the_manifest_says_of_a_task(built_pack: Path) -> None:
    told = {name: entry.told() for name, entry in read_pack(built_pack).tasks.items()}
    assert told["tone"]["labels"] == ["bad", "good"]
    assert told["tone"]["linears"] == 5
    assert told["tone"]["rank"] > told["score"]["rank"] > 0
    entry = read_pack(built_pack).tasks["score"]
    assert entry.num_labels == 1
    assert [record["name"] for record in entry.passes] == [
        "specialize-router", "drop-dead-experts", "factor-pyramid",
    ]  # fmt: skip
    assert entry.parity["verified"] is True
    assert entry.parity["folded"]["verified"] is True


def test_one_task_may_be_a_pack(small_native: Folders, tmp_path: Path) -> None:
    """Of standard operators, too."""
    folder = _build(small_native, tmp_path / "one", task="tone", optimize_for="any")
    assert read_pack(tmp_path / "one").optimized_for == "any"
    assert folder.tasks == ("tone",)
    with eptc.Pack.load(tmp_path / "one", providers=["cpu"]).engine("tone") as engine:
        assert engine.classify(TEXTS["tone"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "keep"}, "--precision keep was given together with --layout pack"),
        ({"precision": "int8"}, "--precision int8 was given together with --layout pack"),
        ({"optimize_for": "cuda"}, "together with --optimize-for cuda"),
        ({"target": "lora"}, "--layout pack was given together with --target lora"),
        ({"routing": "frozen"}, "--routing frozen was given together with --layout pack"),
        ({"probe": "x.jsonl"}, "--probe x.jsonl was given together with --layout pack"),
        ({"max_memory": 10**5}, "takes .* GB, and 0.0 GB may be used"),
    ],
)
def test_options_that_no_pack_has(
    small_native: Folders, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        _build(small_native, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--dry-run",), ("--precision", "all")])
def test_what_is_one_engine_s_alone(
    small_native: Folders, tmp_path: Path, cli: Cli, option: tuple[str, ...]
) -> None:
    ended = cli("export", small_native.ckpt, "--base", small_native.base, "--task", "all",
                "--layout", "pack", "-o", tmp_path / "out", *option)  # fmt: skip
    assert ended.code == 2
    assert "--layout pack" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_target_of_another_package_has_no_packs(small_native: Folders, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--target nothing"):
        _build(small_native, tmp_path / "out", target="nothing")


def test_routes_that_read_the_input_are_refused(small_routed: Folders, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chooses experts by the input, as in bert"):
        _build(small_routed, tmp_path / "out")


def test_tucka_and_prompts_are_refused(
    write_tucka: Callable[..., Folders], small_mept: Callable[..., Folders], tmp_path: Path
) -> None:
    for folders, said in (
        (write_tucka(), "chooses experts by the input"),
        (small_mept(), "puts prompts before the text"),
    ):
        with pytest.raises(CheckpointError, match=said):
            _build(folders, tmp_path / "no", task=None, format=None)


def test_without_parity_the_manifest_says_so(
    small_native: Folders, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "pack"
    ended = cli("export", small_native.ckpt, "--base", small_native.base, "--task", "all",
                "--layout", "pack", "-o", out, "--no-verify")  # fmt: skip
    assert ended.code == 0
    assert "NOT VERIFIED" in ended.stdout
    assert eptc.verify(out).warnings[0] == (
        "task 'tone' was not compared with its reference when it was added"
    )


def _swapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """Exchange A and B of every square linear."""
    found = dict(tensors)
    for name in tensors:
        a, b = factor_names(name.removesuffix(".A"))
        if name == a and tensors[a].shape[0] == tensors[b].shape[1]:
            found[a], found[b] = (np.ascontiguousarray(tensors[n].T) for n in (b, a))
    return found


def _without_head(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in tensors.items() if name != "classifier.bias"}


def _half_head(tensors: dict[str, Any]) -> dict[str, Any]:
    return {n: a / 2 if n.startswith("classifier.") else a for n, a in tensors.items()}


@pytest.mark.parametrize("change", [_swapped, _without_head, _half_head])
def test_faulty_tensors_are_not_published(
    small_native: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:

    def changed(*given: Any) -> dict[str, Any]:
        return change(dict(task_tensors(*given)))

    monkeypatch.setattr("eptc.pack_export.task_tensors", changed)
    with pytest.raises(ParityError):
        _build(small_native, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_tensors_of_another_task_are_not_published(
    small_native: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def first(*given: Any) -> Any:
        made.append(task_tensors(*given))
        return made[0]

    monkeypatch.setattr("eptc.pack_export.task_tensors", first)
    with pytest.raises(ParityError, match=r"the weight .* is off|is not the base's"):
        _build(small_native, tmp_path / "out", task="tone,same")


def _lost_linear(graphs: PackGraphs) -> None:
    """Let one execution of a linear go without its factors."""
    from onnx_ir.convenience import replace_all_uses_with

    graph = graphs.models["model"].graph
    total = next(node for node in graph if (node.name or "").endswith("branch/Add"))
    without = total.inputs[0]
    assert without is not None
    replace_all_uses_with(total.outputs[0], without)


def _no_activation(graphs: PackGraphs) -> None:
    """Let the folded graph's output be off."""
    from onnx_ir.convenience import replace_all_uses_with

    graph = graphs.models["folded.model"].graph
    gelu = next(node for node in graph if node.op_type in ("Gelu", "Erf"))
    linear = gelu.inputs[0]
    assert linear is not None
    replace_all_uses_with(gelu.outputs[0], linear)


@pytest.mark.parametrize(
    ("change", "said"),
    [(_lost_linear, "bug in the switched graphs"), (_no_activation, "bug in the folded graphs")],
)
def test_a_faulty_graph_is_not_published(
    small_native: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[PackGraphs], None],
    said: str,
) -> None:
    right = PackGraphs.make.__func__  # type: ignore[attr-defined]  # of a class method

    def make(cls: type[PackGraphs], *given: Any) -> PackGraphs:
        graphs: PackGraphs = right(cls, *given)
        change(graphs)
        return graphs

    monkeypatch.setattr(PackGraphs, "make", classmethod(make))
    with pytest.raises(ParityError, match="differ") as caught:
        _build(small_native, tmp_path / "out", task="tone")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: dataclasses.replace(spec, transposed=not spec.transposed),
        lambda spec: dataclasses.replace(spec, offset=spec.offset + 64),
    ],
)
def test_a_wrong_place_of_a_weight_is_not_published(
    small_native: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[LinearSpec], LinearSpec],
) -> None:
    right = PackGraphs.linear_specs

    def specs(self: PackGraphs, *given: Any) -> dict[str, LinearSpec]:
        found = right(self, *given)
        path = next(p for p, s in found.items() if s.in_features == s.out_features)
        return {**found, path: change(found[path])}

    monkeypatch.setattr(PackGraphs, "linear_specs", specs)
    with pytest.raises(ParityError, match="is off at"):
        _build(small_native, tmp_path / "out", task="tone")


def test_a_fold_that_is_off_is_not_published(
    small_native: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eptc.runtime import pack_tensors

    right = pack_tensors._folded
    monkeypatch.setattr(pack_tensors, "_folded", lambda *given: right(*given) * 1.0001)
    with pytest.raises(ParityError, match="is off at"):
        _build(small_native, tmp_path / "out", task="tone")


def test_files_are_called_by_their_tasks() -> None:
    assert adapter_file("tone", []) == "tone.onnx_adapter"
    odd = adapter_file("a/b c", [])
    assert odd.startswith("task-")
    assert odd != adapter_file("a/b d", [])
    assert adapter_file("Tone", ["tone.onnx_adapter"]).startswith("task-")
    assert adapter_file("x" * 101, []).startswith("task-")


def test_heads_are_what_depends_on_the_labels(small_native: Folders) -> None:
    from eptc import checkpoint

    source = checkpoint.read(small_native.ckpt, small_native.base)
    assert pack_graphs.head_sizes(source, [2, 0]) == {
        "classifier.bias": ("labels",),
        "classifier.weight": ("labels", 34),
    }
