"""TuckA end to end: exported engines against what the authors' own code gave, and the gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import eptc

CLASSIFIERS = ["roberta-cls", "bert-cls", "deberta-cls", "roberta-k1-wrapped-head"]
SETS = [*CLASSIFIERS, "llama-lm"]
BATCHES = [f"b{i}" for i in range(9)]
GENERATED = ["gen", "gen1"]

Array = np.ndarray[Any, Any]


class Built:
    """A bundle, and its graph in plain ONNX Runtime with the router's gates as outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        self.operators = {node.op_type for node in graph.graph.node}
        self.weights = {tensor.name for tensor in graph.graph.initializer}
        # What mixes the experts' cores reads the gates.
        self.gates = [
            node.input[0]
            for node in graph.graph.node
            if any(name.endswith((".router.cores", ".branch.cores")) for name in node.input)
        ]
        for name in dict.fromkeys(self.gates):
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            graph.graph.output.append(value)
        shown = folder.parent / f"{folder.name}-shown"
        shown.mkdir()
        (shown / "weights.bin").hardlink_to(folder / "weights.bin")
        onnx.save(graph, shown / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            shown / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        given = dict(feeds)
        for value in self.session.get_inputs():
            if value.name == "token_type_ids":
                given[value.name] = np.zeros_like(feeds["input_ids"])
            if value.name.startswith("past") and value.name not in given:
                rows, (_, heads, _, width) = len(feeds["input_ids"]), value.shape
                given[value.name] = np.zeros((rows, heads, 0, width), np.float32)
        return dict(zip(names, self.session.run(names, given), strict=True))

    def route(self, outputs: dict[str, Array], experts: int) -> tuple[list[int], Array]:
        """Return the groups that were chosen, one a route, and the weights in them."""
        found = outputs[self.gates[0]].reshape(-1, self.groups(experts), experts)
        group = found.max(axis=2).argmax(axis=1)
        return group.tolist(), found[np.arange(len(found)), group]

    def groups(self, experts: int) -> int:
        tucka = self.manifest["checkpoint"]["tucka"]
        assert tucka["t"] == experts
        return int(tucka["k"])


@pytest.fixture(scope="module")
def built(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Return a function that exports a recorded checkpoint, verified, once."""
    done: dict[tuple[str, ...], Built] = {}

    def get(name: str, routing: Any = "exact", optimize_for: Any = "any") -> Built:
        key = (name, routing, optimize_for)
        if key not in done:
            source = golden / "tucka" / name
            out = tmp_path_factory.mktemp(name) / "bundle"
            eptc.export(
                source / "checkpoint", base=source / "base", out=out, routing=routing,
                optimize_for=optimize_for,
            )  # fmt: skip
            done[key] = Built(out)
        return done[key]

    return get


@pytest.fixture
def recorded(golden: Path) -> Callable[[str], dict[str, Array]]:
    return lambda name: dict(np.load(golden / "tucka" / name / "golden.npz"))


def feeds(arrays: dict[str, Array], batch: str, name: str) -> dict[str, Array]:
    given = {key: arrays[f"{batch}_{key}"] for key in ("input_ids", "attention_mask")}
    if name == "llama-lm":  # the recorded forward counts every slot
        length = given["input_ids"].shape[1]
        given["position_ids"] = np.tile(np.arange(length), (len(given["input_ids"]), 1))
    return given


@pytest.mark.parametrize("name", SETS)
def test_recorded_logits_and_routes(built: Any, recorded: Any, name: str) -> None:
    engine, arrays = built(name), recorded(name)
    for batch in BATCHES:
        outputs = engine.run(feeds(arrays, batch, name))
        np.testing.assert_allclose(outputs["logits"], arrays[f"{batch}_logits"], rtol=0, atol=2e-5)
        weights = arrays[f"{batch}_route_weights"]
        groups, found = engine.route(outputs, len(weights))
        assert groups == [int(arrays[f"{batch}_route_group"])]
        np.testing.assert_allclose(found[0], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_what_the_bundle_says(built: Any, name: str) -> None:
    manifest = built(name).manifest
    assert manifest["routing"]["mode"] == "batch"
    assert manifest["routing"]["reads_padding"] is (name != "deberta-cls")
    assert "depends on the other rows of its batch" in manifest["routing"]["meaning"]
    assert manifest["parity"]["verified"]
    assert built(name, "per-sample").manifest["routing"]["mode"] == "per-sample"


@pytest.mark.parametrize("name", SETS)
def test_standard_operators_without_branching(built: Any, name: str) -> None:
    engine = built(name)
    assert not engine.operators & {"If", "Loop", "Scan", "TopK", "NonZero"}
    assert len(set(engine.gates)) == 1
    assert len(engine.gates) == 1, "the experts of all linears are mixed at once"


@pytest.mark.parametrize("name", SETS)
def test_each_row_by_itself(built: Any, recorded: Any, name: str) -> None:
    """The answer to a row is the faithful answer to it alone, its padding included."""
    engine, faithful, arrays = built(name, "per-sample"), built(name), recorded(name)
    given = feeds(arrays, "b8", name)
    together = engine.run(given)
    alone = [
        faithful.run({key: value[i : i + 1] for key, value in given.items()}) for i in range(8)
    ]
    logits = np.concatenate([outputs["logits"] for outputs in alone])
    np.testing.assert_allclose(together["logits"], logits, rtol=0, atol=2e-5)
    experts = len(arrays["b8_route_weights"])
    groups, _ = engine.route(together, experts)
    assert groups == [faithful.route(outputs, experts)[0][0] for outputs in alone]


@pytest.mark.parametrize("which", GENERATED)
def test_recorded_generation(built: Any, recorded: Any, which: str) -> None:
    """Greedy tokens, the logits and the route of every step, with the cache in between."""
    built_engine, arrays = built("llama-lm"), recorded("llama-lm")
    ids, mask = arrays[f"{which}_input_ids"], arrays[f"{which}_attention_mask"]
    steps = arrays[f"{which}_step_logits"].shape[1]
    with eptc.Engine.load(built_engine.folder, providers=["cpu"]) as engine:
        rows = engine.generate_ids({"input_ids": ids, "attention_mask": mask}, steps)
    wanted = arrays[f"{which}_sequences"][:, ids.shape[1] :]
    # The recorded run did not stop at an end token; an engine's row ends with it.
    for found, row in zip(rows, wanted.tolist(), strict=True):
        assert found == row[: len(found)]
        assert len(found) == steps or found[-1] == 2

    positions = np.where(mask == 0, 1, mask.cumsum(1) - 1)
    tokens = ids
    cache: dict[str, Array] = {}
    for step in range(steps):
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **cache}
        outputs = built_engine.run(given)
        logits = outputs["logits"][:, -1]
        np.testing.assert_allclose(
            logits, arrays[f"{which}_step_logits"][:, step], rtol=0, atol=5e-5
        )
        assert built_engine.route(outputs, 2)[0] == [int(arrays[f"{which}_route_group"][step])]
        tokens = logits.argmax(-1)[:, None]
        assert tokens[:, 0].tolist() == wanted[:, step].tolist()
        mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
        positions = positions[:, -1:] + 1
        cache = {
            key.replace("present.", "past_key_values."): value
            for key, value in outputs.items()
            if key.startswith("present.")
        }


def test_deberta_keeps_two_routed_linears(built: Any) -> None:
    """All that runs after the table of positions has its route in the weights."""
    weights = built("deberta-cls").weights
    branches = {name.rpartition(".branch.")[0] for name in weights if ".branch.basis" in name}
    attention = "deberta.encoder.layer.0.attention.self"
    assert branches == {f"{attention}.query_proj", f"{attention}.value_proj"}
    assert f"{attention}.query_proj.merged.weight" in weights


@pytest.mark.parametrize("name", ["bert-cls", "deberta-cls", "llama-lm"])
@pytest.mark.parametrize("optimize_for", ["cpu", "cuda"])
def test_fused_graphs(built: Any, recorded: Any, name: str, optimize_for: str) -> None:
    """Fusions stay right beside branches (those of CUDA run on the CPU too)."""
    engine, arrays = built(name, "exact", optimize_for), recorded(name)
    for batch in ("b1", "b8"):
        outputs = engine.run(feeds(arrays, batch, name))
        np.testing.assert_allclose(outputs["logits"], arrays[f"{batch}_logits"], rtol=0, atol=2e-5)


def test_two_builds_are_equal(write_tucka: Any, tmp_path: Path) -> None:
    folders = write_tucka("deberta-v2")
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        eptc.export(folders.ckpt, base=folders.base, out=out, verify=False)
    one, two = ({p.name: p.read_bytes() for p in sorted(out.iterdir())} for out in outs)
    assert one == two


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "llama"])
def test_frozen(write_tucka: Any, small_native: Any, kind: str, tmp_path: Path) -> None:
    """Gates replaced by their mean over text, and folded: no branch is left."""
    folders = write_tucka(kind)
    for file in small_native.base.glob("tokenizer*"):
        (folders.base / file.name).write_bytes(file.read_bytes())
    rows = tmp_path / "rows.jsonl"
    texts = ("good film", "the bad film was long", "very quiet and not dull", "short")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    eptc.export(
        folders.ckpt, base=folders.base, out=folders.out, routing="frozen", calibration=rows
    )
    manifest = json.loads((folders.out / "manifest.json").read_text())
    assert manifest["routing"]["mode"] == "frozen"
    frozen = manifest["parity"]["frozen"]
    assert frozen["rows"] == 4
    assert 0 <= frozen["flips"] <= 4
    # What a decoder writes has no scores.
    assert (frozen["error"] is None) is (kind == "llama")
    graph = onnx.load(folders.out / "model.onnx", load_external_data=False)
    names = [tensor.name for tensor in graph.graph.initializer]
    assert not any(".branch." in name or ".router." in name for name in names)


def test_inspect(write_tucka: Any, cli: Any) -> None:
    folders = write_tucka()
    shown = cli("inspect", folders.ckpt, "--base", folders.base)
    assert shown.code == 0
    assert "3 groups of 2 experts, rank 4, alpha 6" in shown.stdout
    assert "depends on the other rows of its batch" in shown.stdout


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "llama"])
@pytest.mark.parametrize("routing", ["exact", "per-sample"])
def test_small_checkpoints_pass_the_gate(write_tucka: Any, kind: str, routing: Any) -> None:
    folders = write_tucka(kind)
    bundle = eptc.export(
        folders.ckpt, base=folders.base, out=folders.out, routing=routing, optimize_for="any"
    )
    assert bundle.manifest.routing.mode == ("batch" if routing == "exact" else "per-sample")
    assert eptc.parity(folders.out, reference=folders.ckpt, base=folders.base).passed


def test_groups_of_one_expert_pass_the_gate(write_tucka: Any) -> None:
    """One group of one expert has two routes; that of DeBERTa's table may be the text's too."""
    folders = write_tucka("deberta-v2", k=1, t=1)
    eptc.export(folders.ckpt, base=folders.base, out=folders.out, optimize_for="any")
    assert eptc.parity(folders.out, reference=folders.ckpt, base=folders.base).passed


def test_positions_have_no_route_of_a_row(write_tucka: Any, cli: Any) -> None:
    """DeBERTa's table of positions is projected once for all rows: under one route, or none."""
    folders = write_tucka("deberta-v2-positions")
    command = ["export", folders.ckpt, "--base", folders.base, "-o", folders.out]
    refused = cli(*command, "--routing", "per-sample")
    assert refused.code == 2
    assert "layer.0.attention.self.pos_query_proj reads no row of the batch" in refused.stderr
    assert not folders.out.exists()
    eptc.export(folders.ckpt, base=folders.base, out=folders.out)
    assert eptc.parity(folders.out, reference=folders.ckpt, base=folders.base).passed
