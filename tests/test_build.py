"""Export from end to end: recorded answers, equal inputs in other clothes, what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import safetensors.numpy
from onnx import numpy_helper

import eptc
from eptc import checkpoint, skeletons
from eptc.build import Bundle
from eptc.close_routes import SMALL_MARGIN, close_routes
from eptc.errors import OptionError, ParityError, TaskError
from eptc.run_passes import PassRecord
from eptc.runtime import Engine

NAMES = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
Float32 = npt.NDArray[np.float32]


def _export(folders: Any, out: Path, task: str | int = "tone", **options: Any) -> Bundle:
    options = {"verify": False, **options}
    built: Bundle = eptc.export(folders.ckpt, base=folders.base, task=task, out=out, **options)
    return built


def _weights(bundle: Path) -> dict[str, Float32]:
    """Every initializer of a bundle's graphs, by its name."""
    found = {}
    for path in sorted(bundle.glob("*.onnx")):
        for tensor in onnx.load(path).graph.initializer:
            found[f"{path.stem}/{tensor.name}"] = numpy_helper.to_array(tensor)
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- recorded answers


def _t5_logits(engine: Engine, recorded: Mapping[str, Any]) -> Float32:
    feeds = {name: recorded[name] for name in ("input_ids", "attention_mask")}
    encoded = engine.run(feeds, "encoder")
    state = encoded["last_hidden_state"]
    valid = recorded["attention_mask"].astype(bool)
    np.testing.assert_allclose(state[valid], recorded["encoder_last_hidden_state"][valid],
                               rtol=0, atol=5e-5)  # fmt: skip
    feeds = {
        "input_ids": recorded["decoder_input_ids"],
        "encoder_attention_mask": recorded["attention_mask"],
    }
    for spec in engine.manifest.graphs["decoder"].inputs:
        if ".encoder." in spec.name:
            feeds[spec.name] = encoded[spec.name.replace("past_key_values", "present")]
        elif ".decoder." in spec.name:
            feeds[spec.name] = _no_past(spec.shape, len(state))
    return engine.run(feeds, "decoder")["logits"]


def _llama_logits(engine: Engine, recorded: Mapping[str, Any]) -> Float32:
    mask = recorded["attention_mask"]
    feeds = {
        "input_ids": recorded["input_ids"],
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    for spec in engine.manifest.graphs["model"].inputs:
        if spec.name.startswith("past_key_values"):
            feeds[spec.name] = _no_past(spec.shape, len(mask))
    return engine.run(feeds)["logits"]


def _no_past(shape: tuple[int | str, ...], batch: int) -> Float32:
    return np.zeros((batch, int(shape[1]), 0, int(shape[3])), np.float32)


@pytest.mark.parametrize("name", ["t5-tiny", "llama-tiny"])
def test_engines_give_the_recorded_logits(golden: Path, tmp_path: Path, name: str) -> None:
    """Every task of a checkpoint; the parity gate knows nothing of these numbers."""
    folder = golden / "ept" / name
    options: dict[str, Any] = {"base": folder / "base", "top_k": 2, "tasks": NAMES}
    for task_id in range(len(NAMES)):
        built = eptc.export(
            folder / "adapter", task=task_id, out=tmp_path / str(task_id), verify=False, **options
        )
        with (
            built.load(providers=["cpu"]) as engine,
            np.load(folder / "golden" / f"task{task_id}.npz", allow_pickle=False) as recorded,
        ):
            got = (_t5_logits if name.startswith("t5") else _llama_logits)(engine, recorded)
            want = recorded["logits"]
            if name.startswith("llama"):
                valid = recorded["attention_mask"].astype(bool)
                got, want = got[valid], want[valid]
            np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


# ---- the same input in other clothes


def test_shards_give_the_same_bundle(copy_native: Any, tmp_path: Path) -> None:
    whole = _export(copy_native, tmp_path / "whole")
    file = copy_native.base / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    file.unlink()
    index: dict[str, str] = {}
    for i in range(3):
        part = dict(list(tensors.items())[i::3])
        safetensors.numpy.save_file(part, copy_native.base / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (copy_native.base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    sharded = _export(copy_native, tmp_path / "sharded")
    assert _files(sharded.path) == _files(whole.path)


def test_a_pickle_gives_the_same_bundle(copy_golden: Callable[..., Any], tmp_path: Path) -> None:
    plain = _export(copy_golden(), tmp_path / "a", "sst2", top_k=2, tasks=NAMES)
    shutil.rmtree(tmp_path / "in")
    pickled = _export(
        copy_golden(adapter="adapter_bin"), tmp_path / "b", "sst2", top_k=2, tasks=NAMES,
        allow_pickle=True,
    )  # fmt: skip
    assert _files(pickled.path) == _files(plain.path)


def test_a_converted_checkpoint_gives_the_same_engine(
    copy_golden: Callable[..., Any], tmp_path: Path
) -> None:
    folders = copy_golden()
    released = _export(folders, tmp_path / "a", "sst2", top_k=2, tasks=NAMES)
    eptc.convert(folders.ckpt, base=folders.base, out=tmp_path / "n", top_k=2, tasks=NAMES)
    native = eptc.export(
        tmp_path / "n", base=folders.base, task="sentiment", out=tmp_path / "b", verify=False
    )
    one, two = _files(released.path), _files(native.path)
    assert [name for name in one if one[name] != two[name]] == ["manifest.json"]
    assert native.manifest.checkpoint["format"] == "native"
    assert native.manifest.generation == released.manifest.generation


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_base_in_half_precision(copy_native: Any, tmp_path: Path, dtype: Any) -> None:
    """Upcast exactly; a folded weight is rounded once, from float64."""
    _edit_json(copy_native.ckpt / "ept_config.json", lambda c: c["base"].update(sha256=None))
    file = copy_native.base / "model.safetensors"
    halves = {n: t.astype(dtype) for n, t in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(halves, file)
    built = _export(copy_native, tmp_path / "out", verify=True)

    source = checkpoint.read(copy_native.ckpt, copy_native.base)
    written = list(_weights(built.path).values())
    for name, tensor in source.model.weights.items():
        want = tensor.numpy().astype(np.float64)
        adapter = source.model.adapters.get(name.removesuffix(".weight"))
        if adapter is not None:
            want = want + adapter.delta(0)
        rounded = want.astype(np.float32)
        assert any(
            w.shape in (rounded.shape, rounded.T.shape)
            and (np.array_equal(w, rounded) or np.array_equal(w, rounded.T))
            for w in written
            if w.size == rounded.size
        ), name


def _edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_settings_that_the_configuration_leaves_out(copy_native: Any, tmp_path: Path) -> None:
    """Transformers' own defaults stand in for them: here 512 positions, so texts may be longer."""
    _edit_json(copy_native.ckpt / "ept_config.json", lambda c: c["base"].update(sha256=None))
    _edit_json(copy_native.base / "config.json", lambda c: c.pop("max_position_embeddings"))
    file = copy_native.base / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "embeddings.position_embeddings.weight"
    tensors[name] = np.resize(tensors[name], (512, 34))
    safetensors.numpy.save_file(tensors, file)
    built = _export(copy_native, tmp_path / "out", verify=True)
    assert built.manifest.tokenizer is not None
    assert built.manifest.tokenizer.max_length == 512
    with built.load() as engine:
        assert engine.classify(["good " * 500])[0].label in ("good", "bad")


# ---- every option of the native format, trained and saved by eptc.nn


def _scale(rule: str, number: float) -> Any:
    from eptc.nn import ScaleConfig

    return ScaleConfig(rule, **{"denominator" if rule == "d/T" else "alpha": number})  # type: ignore[arg-type]  # tables of plain values


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sharing": "model"}, id="shared"),
        pytest.param({"scale": ("d/T", 3)}, id="d-over-t"),
        pytest.param({"scale": ("alpha/sqrt(r)", 5)}, id="root"),
        pytest.param({"gate": (0.5, "none")}, id="weights-as-they-are"),
        pytest.param({"gate": (0.2, "softmax")}, id="second-softmax"),
        pytest.param({"kernel_sizes": (1, 5, 37, 64), "top_k": 4}, id="odd-and-large-kernels"),
        pytest.param({"variant": "released", "kernel_sizes": (2, 3, 16, 40)}, id="released"),
        pytest.param(
            {"modules": ("bert.encoder.layer.0.output.dense", 5, 2.5)}, id="a-linear-of-its-own"
        ),
    ],
)
def test_options_of_the_native_format(
    copy_native: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Each passes the gate, whose reference reads the folder with code of its own."""
    import torch

    from eptc.nn import EptConfig, EptModel, GateConfig, ModuleConfig, load_base
    from eptc.tasks import Task

    values: dict[str, Any] = {"kernel_sizes": (2, 3, 4), "top_k": 2, "variant": "paper", **options}
    if "scale" in values:
        values["scale"] = _scale(*values["scale"])
    if "gate" in values:
        values["gate"] = GateConfig("task", *values["gate"])
    if "modules" in values:
        path, rank, alpha = values["modules"]
        values["modules"] = {path: ModuleConfig(rank, alpha)}
    config = EptConfig(
        targets=("key", "dense"),
        rank=3,
        tasks=(
            Task("one", "classification", labels=("a", "b")),
            Task("two", "classification", labels=("c", "d")),
        ),
        **values,
    )
    model = EptModel.attach(load_base(copy_native.base), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save(tmp_path / "trained", base_dir=copy_native.base)

    built = eptc.export(
        tmp_path / "trained", base=copy_native.base, task="two", out=tmp_path / "out"
    )

    assert built.manifest.parity["passed"]
    contents = checkpoint.read(tmp_path / "trained", copy_native.base).contents
    rng = np.random.default_rng(0)
    with torch.no_grad(), model.eval().task("two"):
        for path, adapter in contents.adapters.items():
            layer = model.layers[path]
            delta = adapter.delta(1)
            x = rng.standard_normal((5, delta.shape[1])).astype(np.float32)
            both = layer(torch.from_numpy(x)) - layer.base(torch.from_numpy(x))
            np.testing.assert_allclose(x @ delta.T, both.numpy(), rtol=1e-4, atol=1e-4)
            assert np.abs(delta).max() > 0


# ---- what is traced, told and warned of


def test_tasks_share_a_trace(copy_native: Any, tmp_path: Path) -> None:
    """Also where their labels have other names; another number of outputs is another graph."""
    _export(copy_native, tmp_path / "tone", "tone")
    misses = skeletons._skeleton.cache_info().misses
    _export(copy_native, tmp_path / "same", "same")
    assert skeletons._skeleton.cache_info().misses == misses
    labels = json.loads((tmp_path / "same" / "config.json").read_text())["id2label"]
    assert labels == {"0": "no", "1": "yes"}


def test_progress_tells_stages_and_passes(copy_native: Any, tmp_path: Path) -> None:
    events: list[str | PassRecord] = []
    built = _export(copy_native, tmp_path / "out", verify=True, progress=events.append)
    stages = [e for e in events if isinstance(e, str) and not e.startswith("parity:")]
    assert stages == list(built.seconds)
    assert tuple(e for e in events if isinstance(e, PassRecord)) == built.passes
    assert [step["name"] for step in built.manifest.passes] == [r.name for r in built.passes]


def test_a_name_an_alias_and_an_id_give_the_same_bundle(copy_native: Any, tmp_path: Path) -> None:
    tasks: tuple[str | int, ...] = ("tone", "Sentiment", "0", 0)
    bundles = [
        _files(_export(copy_native, tmp_path / str(i), task).path) for i, task in enumerate(tasks)
    ]
    assert all(bundle == bundles[0] for bundle in bundles)


def test_a_choice_of_experts_that_is_nearly_a_tie(copy_native: Any, cli: Any) -> None:
    file = copy_native.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    path = "bert.encoder.layer.0.attention.self.query"
    tensors[f"{path}.ept.router.weight"] *= 1e-7
    safetensors.numpy.save_file(tensors, file)
    source = checkpoint.read(copy_native.ckpt, copy_native.base)
    router = source.contents.adapters[path].router
    assert router is not None
    assert router.route(0).margin < SMALL_MARGIN
    assert [note.split(":")[0] for note in close_routes(source, 0)] == [path]
    options = ("--base", copy_native.base, "--task", "tone", "--no-verify")
    result = cli("export", copy_native.ckpt, *options, "-o", copy_native.out)
    assert result.code == 0
    assert result.stderr.startswith(f"eptc: warning: {path}: the last expert chosen leads by only")


def test_the_checkpoints_tokenizer_comes_first(copy_native: Any, tmp_path: Path) -> None:
    first = _export(copy_native, tmp_path / "base")
    for path in copy_native.base.glob("*token*"):
        shutil.copy(path, copy_native.ckpt)
    second = _export(copy_native, tmp_path / "ckpt")
    sources = [b.manifest.tokenizer.source for b in (first, second) if b.manifest.tokenizer]
    assert sources == ["base", "checkpoint"]


def test_no_tokenizer_at_all(copy_native: Any, cli: Any) -> None:
    """An engine for token ids: text is refused with a reason."""
    for path in copy_native.base.glob("*token*"):
        path.unlink()
    built = _export(copy_native, copy_native.out)
    assert built.manifest.tokenizer is None
    assert not list(built.path.glob("*token*"))
    result = cli("run", built.path, "good")
    assert result.code == 2
    assert "tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"precision": "fp16"},
            "fp16 follows from ranges that are seen on text.*--precision that",
        ),
        ({"precision": "int8-static", "calibration": "rows"}, "int8-static follows from ranges"),
        ({"routing": "frozen"}, "replaces gates by what they are on text.*leave --routing out"),
    ],
)
def test_what_is_seen_on_text_needs_a_tokenizer(
    small_routed: Any, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """Said before anything is read of the weights, with what can be done about it."""
    ignore = shutil.ignore_patterns("*token*")
    base = Path(shutil.copytree(small_routed.base, tmp_path / "base", ignore=ignore))
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=f"(?s){words}") as refused:
        eptc.export(small_routed.ckpt, base=base, task="tone", out=out, **options)
    for part in (small_routed.ckpt, base, "has a tokenizer", "beside the base model"):
        assert str(part) in str(refused.value)
    assert not out.exists()


# ---- what Python callers get


def test_errors_are_raised(copy_native: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="target is 'tensorflow'"):
        _export(copy_native, out, target="tensorflow")
    with pytest.raises(OptionError, match="no base model"):
        eptc.export(copy_native.ckpt, task="tone", out=out)
    with pytest.raises(OptionError, match="--probe was given"):
        _export(copy_native, out, probe=tmp_path / "x")
    with pytest.raises(TaskError, match="no task 'stone': did you mean 'tone'"):
        _export(copy_native, out, "stone")
    assert not out.exists()


def test_nothing_is_published_where_parity_fails(
    copy_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    """A wrong fold: exit code 1, and the old bundle stays."""
    from eptc.ir import folding

    _export(copy_native, copy_native.out)
    before = _files(copy_native.out)
    fold = folding._fold

    def wrong(*arguments: Any) -> Any:
        return np.asarray(fold(*arguments), np.float32) * np.float32(1.001)

    monkeypatch.setattr(folding, "_fold", wrong)
    with pytest.raises(ParityError):
        _export(copy_native, tmp_path / "new", verify=True)
    options = ("--base", copy_native.base, "--task", "tone", "--force", "-o", copy_native.out)
    result = cli("export", copy_native.ckpt, *options)
    assert result.code == 1
    assert "fold-pyramid" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert _files(copy_native.out) == before
