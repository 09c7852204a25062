"""Engines below float32, from the checkpoint to the bundle: small ones, judged, refused."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir
import pytest
import safetensors.numpy

import eptc
from eptc import checkpoint, lower
from eptc.calibration import twin
from eptc.errors import OptionError, ParityError
from eptc.job import Job
from eptc.lower.blocks import PRECISIONS
from eptc.lower.int8 import integers
from eptc.parity_gate import reference_answers
from eptc.parity_gate.compare import bound_of
from eptc.parity_gate.stored import quantized
from eptc.pass_base import Contract, GraphPass
from eptc.pipeline import lossy_passes
from eptc.tensors import ArrayTensor

HEAD = "classifier.weight"
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
# Options a precision needs, the most its weights may take of float32's, and how most are stored.
BUILT: dict[str, tuple[dict[str, Any], float, str]] = {
    "fp16": ({}, 0.51, "fp16"),
    "bf16": ({"optimize_for": "cuda"}, 0.51, "bf16"),
    "int8": ({}, 0.30, "int8"),
    "int8-static": ({"calibration": True}, 0.30, "int8"),
    # The table of words, and of positions, is most of this model.
    "fp8": ({"calibration": True, "optimize_for": "any"}, 0.65, "fp8"),
    "int8-fp16": ({"calibration": True, "target": "tensorrt"}, 0.40, "int8"),
    "fp8-fp16": ({"calibration": True, "optimize_for": "any"}, 0.40, "fp8"),
    "int4": ({}, 0.31, "int4"),  # rows of 34 numbers are filled up to two blocks of 32
}


@pytest.fixture(scope="module")
def build(small_native: Any, small_rows: Any) -> Callable[..., eptc.Bundle]:
    """Return a function that compiles the small checkpoint's regression."""

    def run(out: Path, precision: Any, **options: Any) -> eptc.Bundle:
        if options.get("calibration") is True:
            options["calibration"] = small_rows.texts
        bundle: eptc.Bundle = eptc.export(
            small_native.ckpt, base=small_native.base, task="score", out=out,
            precision=precision, **options,
        )  # fmt: skip
        return bundle

    return run


@pytest.fixture(scope="module")
def exact(build: Any, tmp_path_factory: pytest.TempPathFactory) -> eptc.Bundle:
    bundle: eptc.Bundle = build(tmp_path_factory.mktemp("exact") / "out", "fp32")
    return bundle


@functools.cache
def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("precision", BUILT)
def test_built_and_judged(
    build: Any, exact: eptc.Bundle, small_rows: Any, tmp_path: Path, precision: str
) -> None:
    """Smaller, proven exact, then within its bound, scored, recorded; twice the same."""
    options, most, stored = BUILT[precision]
    given = {"data": small_rows.values, "max_drop": 10.0, **options}
    one, other = (build(tmp_path / name, precision, **given) for name in ("one", "other"))
    assert one.manifest.precision == precision
    assert one.manifest.files["weights.bin"].size <= most * (
        exact.manifest.files["weights.bin"].size
    )
    for path in (one.path / name for name in one.manifest.files):
        if path.name != "parity.json":  # the same but for errors that depend on threads
            assert path.read_bytes() == (other.path / path.name).read_bytes(), path.name

    parity = one.manifest.parity
    assert parity["verified"]
    assert parity["passed"]
    assert parity["exact"]["passed"]
    assert parity["exact"]["largest_error"] < 1e-4 < parity["largest_error"]
    details = read(one.path / "parity.json")
    assert details["exact"]["bound"] != details["bound"]
    assert details["scores"] == parity["scores"]
    assert details["scores"]["rows"] == 120
    assert 0 <= details["scores"]["drop"] <= 0.1
    assert ("engine" in details) is (precision in ("fp16", "bf16", "int8-fp16", "fp8-fp16"))

    plan = read(one.path / "precision.json")
    assert plan["weights"][HEAD] == "fp32"
    assert "decides" in plan["stays_float32"][HEAD]
    assert [*plan["weights"].values()].count(stored) >= len(plan["weights"]) - 4
    # Nothing but what is declared; no scratch engine is left.
    assert {path.name for path in one.path.iterdir()} == {*one.manifest.files, "manifest.json"}


@pytest.mark.parametrize(
    "precision", ["int8", "int8-static", "fp8", "int4", "fp16", "int8-fp16", "fp8-fp16"]
)
def test_engines_answer(build: Any, small_rows: Any, tmp_path: Path, precision: str) -> None:
    """An engine loads where it was optimised for and answers nearly as float32 does."""
    rows = [json.loads(line) for line in small_rows.values.read_text().splitlines()]
    bundle = build(tmp_path / "out", precision, **BUILT[precision][0])
    with bundle.load(providers=["cpu"]) as engine:
        got = np.array([answer.value for answer in engine.classify(rows)])
    want = np.array([row["label"] for row in rows])
    assert np.abs(got - want).max() > 0
    assert np.corrcoef(got, want)[0, 1] > 0.9


@pytest.mark.parametrize("precision", BUILT)
def test_checked_again(
    build: Any, small_native: Any, small_rows: Any, tmp_path: Path, precision: str
) -> None:
    """A published engine is judged as it was when it was built, 16 bits by their twin."""
    given = (
        {"data": small_rows.values, "max_drop": 10.0}
        if "fp8" in precision or precision == "int4"
        else {}
    )
    bundle = build(tmp_path / "out", precision, **given, **BUILT[precision][0])
    report = eptc.parity(
        bundle.path, reference=small_native.ckpt, base=small_native.base, data=small_rows.values
    )
    assert report.passed
    assert report.bound == bound_of(precision)
    assert report.scores is not None
    assert report.scores["reference"] == 1.0
    assert 0 <= report.scores["drop"] < 0.1
    assert {path.name for path in bundle.path.iterdir()} == {
        *bundle.manifest.files, "manifest.json",
    }  # fmt: skip


def test_values_have_a_budget_of_their_own(
    build: Any, small_native: Any, small_rows: Any, tmp_path: Path
) -> None:
    """Where nothing is said a point may be lost: int4 loses more."""
    bundle = build(tmp_path / "out", "int4")
    with pytest.raises(ParityError, match=r"the pearson drops by .* allowed are 1"):
        eptc.parity(
            bundle.path, reference=small_native.ckpt, base=small_native.base,
            data=small_rows.values,
        )  # fmt: skip


@pytest.mark.parametrize("why", ["full", "gone"])
def test_no_room_for_the_simulation(
    build: Any, small_native: Any, cli: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, why: str,
) -> None:  # fmt: skip
    """A copy of a 16-bit engine needs room: where there is none, that is no bug of eptc."""
    bundle = build(tmp_path / "out", "fp16")
    place = tmp_path / "place"
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    arguments = (
        "parity", bundle.path, "--reference", small_native.ckpt, "--base", small_native.base,
    )  # fmt: skip
    if why == "gone":
        result = cli(*arguments)
    else:
        place.mkdir()
        with files_of_at_most(2**10):
            result = cli(*arguments)
        assert list(place.iterdir()) == []
    assert result.code == 2, result
    for words in ("is an engine in fp16", "cannot be written", "MB free", "TMPDIR"):
        assert words in result.stderr
    assert ("File too large" if why == "full" else "No such file") in result.stderr
    place.mkdir(exist_ok=True)
    assert cli(*arguments).code == 0


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write files past a size, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 0), ("int8", 1)])
def test_flips_found_again(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, most: int
) -> None:
    """Of 100 labels that the reference is sure of, one may change below float32, else none."""
    out = tmp_path / "out"
    eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", out=out, precision=precision,
        verify=False,
    )  # fmt: skip
    data = tmp_path / "data.jsonl"
    rows = [{"text": "good " * (i % 9 + 1), "label": "good"} for i in range(100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flips = 0

    def answers(*arguments: Any) -> Any:
        want = reference_answers(*arguments)
        want.scores[:flips] *= -1
        return dataclasses.replace(want, chosen=want.scores.argmax(axis=1))

    with eptc.Engine.load(out, providers=["cpu"]) as engine:
        assert {answer.label for answer in engine.classify(rows)} == {"good"}
    monkeypatch.setattr("eptc.pair.reference_answers", answers)
    options = {"reference": small_native.ckpt, "base": small_native.base, "data": data}
    flips = most
    scores = eptc.parity(out, **options).scores
    assert scores is not None
    assert scores["flips_beyond_noise"] == most
    flips = most + 1
    with pytest.raises(ParityError, match=f"{flips} of 100 labels change"):
        eptc.parity(out, **options)


def test_calibrated_engine_by_block(
    build: Any, small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short for it, that is said; an engine in int8 is compared by block."""
    monkeypatch.setattr("eptc.pair.available_memory", lambda: 2**10)
    options = {"reference": small_native.ckpt, "base": small_native.base}
    half = build(tmp_path / "fp16", "fp16", verify=False)
    with pytest.raises(OptionError, match="is an engine in fp16, whose ranges hold for the model"):
        eptc.parity(half.path, **options)
    whole = build(tmp_path / "int8", "int8", verify=False)
    assert eptc.parity(whole.path, **options).mode == "block by block"


def test_what_stays_float32_is_stored_so(build: Any, tmp_path: Path) -> None:
    """The report is not a wish: the head in the file has four bytes a number, the others one."""
    graph = onnx.load(
        build(tmp_path / "out", "int8").path / "model.onnx", load_external_data=False
    ).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for name, level in read(tmp_path / "out" / "precision.json")["weights"].items():
        expected = {"fp32": onnx.TensorProto.FLOAT, "int8": onnx.TensorProto.INT8}[level]
        assert types[name] == expected, name


# A weight that stays float32, and a piece of the reason.
STAYS = {
    "int8": ("bert.embeddings.token_type_embeddings.weight", "a table of 2 rows"),
    "int8-static": ("bert.embeddings.token_type_embeddings.weight", "a table of 2 rows"),
    "int8-weights": ("bert.embeddings.word_embeddings.weight", "rows of 34 are shorter"),
    "int4": ("bert.pooler.dense.weight", "Gemm reads it"),
}


@pytest.mark.parametrize("precision", STAYS)
def test_why_each_weight_stays_float32(build: Any, tmp_path: Path, precision: str) -> None:
    """Every weight that the file has in float32 has its reason, and no other weight has one."""
    bundle = build(tmp_path / "out", precision, **BUILT.get(precision, ({},))[0])
    report = read(bundle.path / "precision.json")
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    single = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    weights = {name for name in single if "@" not in name and not name.startswith("constants.")}
    assert {name for name, level in report["weights"].items() if level == "fp32"} <= weights
    assert report["stays_float32"].keys() == weights
    assert report["stays_float32"]["bert.embeddings.LayerNorm.weight"] == "it is no matrix"
    name, reason = STAYS[precision]
    assert reason in report["stays_float32"][name]


def test_precision_without_effect(build: Any, tmp_path: Path) -> None:
    """Every matrix is narrower than a block: the engine is a float32 one, and that is said."""
    assert PRECISIONS["int8-weights"].size > 51
    bundle = build(tmp_path / "out", "int8-weights")
    assert any("no weight could be stored in int8-weights" in note for note in bundle.warnings)
    assert set(read(bundle.path / "precision.json")["weights"].values()) == {"fp32"}


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4"])
@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_block_by_block(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: Any
) -> None:
    """Under little memory: weights and their use as tightly as float32's; then as published."""
    monkeypatch.setattr("eptc.parity_gate.memory.verified_by_block", lambda *_: True)
    folder = golden / "ept" / name
    bundle = eptc.export(
        folder / "adapter", base=folder / "base", task="sst2", tasks=GLUE, top_k=2,
        out=tmp_path / "out", precision=precision,
    )  # fmt: skip
    parity = bundle.manifest.parity
    assert parity["mode"] == "block by block"
    assert parity["passed"]
    assert "exact" not in parity
    details = read(bundle.path / "parity.json")
    assert max(tensor["bound"] for tensor in details["tensors"]) < 1e-3
    assert "weights as they are stored" in parity["reference"]
    assert parity["as_published"]["tensors"] == len(details["as_published"]["tensors"]) > 0
    assert details["as_published"]["bound"]["relative"] == bound_of(precision).relative


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp16", "--precision fp16 is calibrated on the whole float32 engine"),
        ("int8-static", "--precision int8-static is calibrated on the whole float32 engine"),
        ("int8", "--data is scored on the whole float32 engine"),
    ],
)
def test_whole_engine_that_does_not_fit(
    build: Any, exact: eptc.Bundle, small_rows: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, precision: str, words: str,
) -> None:  # fmt: skip
    """Calibrated and scored engines need it, and that is said before anything is read."""
    del exact
    monkeypatch.setattr("eptc.planning.available_memory", lambda: 2**20)
    options = {"data": small_rows.values} if precision == "int8" else BUILT[precision][0]
    with pytest.raises(OptionError, match=words) as raised:
        build(tmp_path / "out", precision, **options)
    assert "--max-memory" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_gates_refuse(build: Any, small_rows: Any, tmp_path: Path) -> None:
    """An engine over the budget is not published; one point is more than int8 loses."""
    given = {"data": small_rows.values, "max_drop": 1.0}
    assert build(tmp_path / "int8", "int8", **given).manifest.parity["scores"]["drop"] <= 0.01
    with pytest.raises(ParityError, match=r"int4: the pearson drops by .* points over 120 rows"):
        build(tmp_path / "int4", "int4", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_budget_holds_without_verification(build: Any, small_rows: Any, tmp_path: Path) -> None:
    """`verify=False` leaves out the reference, not the budget the user set."""
    given = {"data": small_rows.values, "verify": False}
    bundle = build(tmp_path / "int8", "int8", max_drop=1.0, **given)
    assert not bundle.manifest.parity["verified"]
    assert bundle.manifest.parity["scores"]["rows"] == 120
    with pytest.raises(ParityError, match="int4: the pearson drops"):
        build(tmp_path / "int4", "int4", max_drop=1.0, **given)


@dataclasses.dataclass(frozen=True)
class LooseNorms(GraphPass):
    """A faulty pass: what it does to answers drowns in what int8 does."""

    name: ClassVar[str] = "loose-norms"
    contract: ClassVar[Contract] = "exact"
    epsilon: float = 1e-2

    def rewrite(self, model: onnx_ir.Model) -> int:
        norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
        for norm in norms:
            norm.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", self.epsilon)
        return len(norms)


def test_weights_beyond_float16(copy_native: Any, small_rows: Any, tmp_path: Path) -> None:
    """They stay float32 with what computes with them, and the engine answers as float32 does.

    One is read with a number as far below one as it is above; one, of a position that no text
    reaches, would make every long text infinite where its rows were added in float16.
    """
    path = copy_native.base / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    block = "encoder.layer.0"
    far = 2.0**18
    tensors[f"{block}.output.dense.weight"][:, 5] *= far
    for kind in ("weight", "bias"):
        tensors[f"{block}.intermediate.dense.{kind}"][5] /= far
    tensors["embeddings.position_embeddings.weight"][100] = np.linspace(-9e4, 9e4, 34)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path = copy_native.ckpt / "ept_config.json"
    config = json.loads(path.read_text())
    config["base"]["sha256"] = None
    path.write_text(json.dumps(config))
    options = {"base": copy_native.base, "task": "score"}
    exact = eptc.export(copy_native.ckpt, out=tmp_path / "exact", verify=False, **options)
    half = eptc.export(
        copy_native.ckpt, out=tmp_path / "half", precision="fp16", calibration=small_rows.texts,
        **options,
    )  # fmt: skip
    report = read(half.path / "precision.json")
    large = {
        f"bert.{block}.output.dense.weight", "bert.embeddings.position_embeddings.weight",
    }  # fmt: skip
    for name in large:
        assert report["weights"][name] == "fp32"
        assert "beyond 65504" in report["stays_float32"][name]
    levels = collections.Counter(report["weights"].values())
    assert levels == {"fp32": 3, "fp16": len(report["weights"]) - 3}  # the head is the third
    assert f"bert.{block}.output.dense/MatMul" in report["stays_float32"]
    assert "bert.embeddings.LayerNorm/LayerNormalization" in report["stays_float32"]
    long = " ".join(["a good film"] * 60)
    answers = []
    with twin(half.path) as simulated:
        for folder in (exact.path, simulated):
            with eptc.Engine.load(folder, providers=["cpu"]) as engine:
                answers.append([answer.value for answer in engine.classify(["good", long])])
    want, got = answers
    assert got == pytest.approx(want, rel=0, abs=0.01)
    assert want[0] != pytest.approx(want[1], abs=0.1)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_exact_engine_is_proven_first(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A fault too small for the bound of a lossy engine is found before anything is lowered."""
    sound = Job.graph_passes
    monkeypatch.setattr(Job, "graph_passes", lambda job: [*sound(job), LooseNorms()])
    build(tmp_path / "unproven", precision, verify=False)
    with pytest.raises(ParityError, match="the pass loose-norms is the first step"):
        build(tmp_path / "out", precision)
    assert [path.name for path in tmp_path.iterdir()] == ["unproven"]


def test_lossy_engine_is_bounded(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of a pass that lowers: its weights are right, its answers too far off."""
    monkeypatch.setattr(
        "eptc.lossy.lossy_passes",
        lambda *given, **options: [*lossy_passes(*given, **options), LooseNorms(100.0)],
    )
    with pytest.raises(ParityError, match="output tensors differ") as raised:
        build(tmp_path / "out", "int8")
    assert "int8 loses more on this model than it may" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_quantising_before_folding(
    build: Any, small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base in int8, the experts added, the sum in int8 again: worse, and refused."""
    base = checkpoint.read(small_native.ckpt, small_native.base).model.weights
    sound = lower.bind
    folded: dict[str, Any] = {}

    def bind(graphs: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        changed = {}
        for name, tensor in weights.items():
            if len(tensor.shape) != 2 or tensor.dtype != "float64":
                continue  # not adapted
            folded[name], plain = tensor.numpy(), base[name].numpy()
            whole, scale = integers(onnx_ir.tensor(plain, name=name), 0)
            rounded = whole.numpy() * scale.numpy().astype(np.float64)[:, None]
            changed[name] = ArrayTensor(name, rounded + (folded[name] - plain))
        sound(graphs, {**weights, **changed})

    def error(path: Path) -> float:
        """Return how far the weights of an engine are from the sums of base and experts."""
        stored = {w.name: w.open() for w in quantized(onnx_ir.load(path / "model.onnx").graph)}
        errors = [
            stored[name].rows(slice(None), exact.shape[1]).numbers - exact
            for name, exact in folded.items()
        ]
        return float(np.sqrt(np.mean(np.concatenate([e.ravel() for e in errors]) ** 2)))

    after = build(tmp_path / "after", "int8").path
    monkeypatch.setattr(lower, "bind", bind)
    before = build(tmp_path / "before", "int8", verify=False).path
    assert folded
    assert error(before) > 1.2 * error(after)
    with pytest.raises(ParityError, match=r"the weight .* in the engine is off"):
        build(tmp_path / "refused", "int8")
    assert not (tmp_path / "refused").exists()
