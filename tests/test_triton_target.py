"""`--target triton`: repositories that hold proven engines, and configurations Triton can read."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
from google.protobuf import text_format

import eptc
from eptc.errors import EptcError, OptionError, OutputError, ParityError, TaskError
from eptc.interop.triton_config import MAX_BATCH, model_config
from eptc.runtime import Engine, verify
from eptc.runtime.manifest import Manifest, load_manifest
from eptc.runtime.routing import RoutingSpec
from eptc.runtime.spec import DTYPES, GraphSpec, TensorSpec

TEXTS = ["the film was good", "bad", "not a very long film and not a dull film"]
TYPES = {
    "TYPE_BOOL": "tensor(bool)", "TYPE_FP16": "tensor(float16)", "TYPE_FP32": "tensor(float)",
    "TYPE_INT32": "tensor(int32)", "TYPE_INT64": "tensor(int64)",
}  # fmt: skip
NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's published model_config.proto, as its client package compiles it.

    Its file alone is loaded: the package around it wants gRPC.
    """
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs tritonclient, which has Triton's schema: pip install -e .[dev]")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(schema: Any, text: str) -> Any:
    """Read a configuration; an unknown field, a wrong type or a wrong name of one is an error."""
    return text_format.Parse(text, schema.ModelConfig())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def repository(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> eptc.Folder:
    """Every task of the small native checkpoint."""
    return eptc.export(
        small_native.ckpt, base=small_native.base, target="triton", task="all",
        out=tmp_path_factory.mktemp("triton") / "repository",
    )  # fmt: skip


def requested(schema: Any, config: Any) -> dict[str, Any]:
    """Return the arrays a graph gets for the warm-up, as Triton makes them."""
    (warm_up,) = config.model_warmup
    assert warm_up.batch_size == 1
    assert set(warm_up.inputs) == {tensor.name for tensor in config.input}
    feeds = {}
    for tensor in config.input:
        given = warm_up.inputs[tensor.name]
        name = schema.DataType.Name(tensor.data_type)
        assert given.data_type == tensor.data_type
        assert given.zero_data
        assert len(given.dims) == len(tensor.dims)
        for said, size in zip(given.dims, tensor.dims, strict=True):
            assert said > 0
            assert size in (-1, said)
        shape = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(given.dims)
        rows = [1] if config.max_batch_size else []
        feeds[tensor.name] = np.zeros([*rows, *shape], NUMPY[name])
    return feeds


def check_models(schema: Any, folder: Path) -> dict[str, Any]:
    """Check every model of a repository against its graph, and run its warm-up."""
    configs = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = parsed(schema, (place / "config.pbtxt").read_text())
        assert config.name == place.name
        assert config.backend == "onnxruntime"
        assert [path.name for path in place.iterdir() if path.is_dir()] == ["1"]
        assert verify(place / "1").ok
        session = onnxruntime.InferenceSession(
            place / "1" / config.default_model_filename, providers=["CPUExecutionProvider"]
        )
        for said, found in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            assert [tensor.name for tensor in said] == [tensor.name for tensor in found]
            for tensor, node in zip(said, found, strict=True):
                assert TYPES[schema.DataType.Name(tensor.data_type)] == node.type
                dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
                rows = [-1] if config.max_batch_size else []
                assert [*rows, *dims] == [s if isinstance(s, int) else -1 for s in node.shape]
        answers = session.run(None, requested(schema, config))
        for tensor, answer in zip(config.output, answers, strict=True):
            assert answer.ndim == len(tensor.dims) + (config.max_batch_size > 0)
            assert np.isfinite(answer).all()
        configs[config.name] = config
    return configs


# ---- repositories


def test_every_task_is_a_model(schema: Any, repository: eptc.Folder) -> None:
    """And all of them are one more, whose rows name their task."""
    assert repository.tasks == ("tone", "same", "score")
    assert set(repository.parity) == {"tone", "same", "score", "multitask"}
    assert all(parity["verified"] for parity in repository.parity.values())
    configs = check_models(schema, repository.path)
    assert set(configs) == {"tone", "same", "score", "multitask"}
    for name, config in configs.items():
        assert config.max_batch_size == MAX_BATCH
        assert config.HasField("dynamic_batching")
        (group,) = config.instance_group
        assert (group.count, group.kind) == (1, schema.ModelInstanceGroup.KIND_CPU)
        labels = {"tone": "bad\ngood\n", "same": "no\nyes\n"}.get(name)
        (logits,) = config.output
        assert logits.label_filename == ("labels.txt" if labels else "")
        path = repository.path / name / "labels.txt"
        assert (path.read_text() if path.exists() else None) == labels


def test_a_version_is_the_bundle(
    small_native: Any, repository: eptc.Folder, tmp_path: Path
) -> None:
    """The bytes that passed the gate: the same as of the engine that is exported by itself."""
    bundle = eptc.export(
        small_native.ckpt, base=small_native.base, task="tone", out=tmp_path / "tone"
    )
    version = repository.path / "tone" / "1"
    assert contents(version) == contents(bundle.path)
    with Engine.load(version, ["cpu"]) as served, bundle.load(providers=["cpu"]) as alone:
        assert served.classify(TEXTS) == alone.classify(TEXTS)


def test_a_row_names_its_task(schema: Any, repository: eptc.Folder) -> None:
    """Rows as Triton hands them on, against the engines of one task each."""
    place = repository.path / "multitask"
    config = parsed(schema, (place / "config.pbtxt").read_text())
    assert config.HasField("dynamic_batching")
    (tasks,) = (tensor for tensor in config.input if tensor.name == "task_ids")
    assert (list(tasks.dims), list(tasks.reshape.shape)) == ([1], [])
    session = onnxruntime.InferenceSession(
        place / "1" / config.default_model_filename, providers=["CPUExecutionProvider"]
    )
    for number, name in enumerate(repository.tasks):
        with Engine.load(repository.path / name / "1", ["cpu"]) as alone:
            given = [(text, "bad") for text in TEXTS] if name == "same" else TEXTS
            feeds = alone.tokenize(given)
            (want,) = alone.run(feeds).values()
        (found,) = session.run(None, {**feeds, "task_ids": np.full(len(TEXTS), number, np.int64)})
        np.testing.assert_allclose(found[:, : want.shape[1]], want, rtol=0, atol=1e-5)


def test_an_encoder_and_its_decoder_are_two_models(
    schema: Any, small_mept: Any, tmp_path: Path
) -> None:
    folders = small_mept("t5")
    made = eptc.export(folders.ckpt, base=folders.base, target="triton", out=tmp_path / "out")
    assert made.details == {"default": {"models": ["default_encoder", "default_decoder"]}}
    configs = check_models(schema, made.path)
    assert set(configs) == {"default_encoder", "default_decoder"}
    encoder, decoder = configs["default_encoder"], configs["default_decoder"]
    # What the one says the other reads, name by name.
    handed = {tensor.name.replace("present", "past_key_values") for tensor in encoder.output}
    assert handed - {"last_hidden_state"} <= {tensor.name for tensor in decoder.input}
    assert contents(made.path / "default_encoder" / "1") == contents(
        made.path / "default_decoder" / "1"
    )


def test_a_decoder(schema: Any, copy_golden: Any) -> None:
    folders = copy_golden("llama-tiny")
    made = eptc.export(
        folders.ckpt, base=folders.base, target="triton", task="cola", top_k=2, verify=False,
        tasks=["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"], out=folders.out,
    )  # fmt: skip
    config = check_models(schema, made.path)["cola"]
    dims = {tensor.name: list(tensor.dims) for tensor in config.input}
    assert dims["attention_mask"] == [-1]
    (warm_up,) = config.model_warmup
    sizes = {name: list(given.dims) for name, given in warm_up.inputs.items()}
    assert sizes["input_ids"] == [1]
    assert sizes["attention_mask"] == [sizes["past_key_values.0.key"][1] + 1]


def test_two_exports_are_equal(small_native: Any, repository: eptc.Folder, tmp_path: Path) -> None:
    """And one takes the other's place."""
    given: dict[str, Any] = {"base": small_native.base, "target": "triton"}
    out = tmp_path / "out"
    eptc.export(small_native.ckpt, task="same", out=out, verify=False, **given)
    assert sorted(path.name for path in out.iterdir()) == ["eptc.json", "same"]
    with pytest.raises(OutputError, match="not empty"):
        eptc.export(small_native.ckpt, task="all", out=out, **given)
    eptc.export(small_native.ckpt, task="tone,same,score", out=out, force=True, **given)
    found = contents(out)
    assert found == contents(repository.path)
    assert not any(str(tmp_path).encode() in content for content in found.values())
    (out / "tone" / "2").mkdir()
    with pytest.raises(OutputError, match="such as tone/2"):
        eptc.export(small_native.ckpt, task="all", out=out, force=True, **given)
    assert contents(out) == found


# ---- the gate


def test_a_wrong_engine_is_never_published(
    small_native: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last task's engine is off, those before it are not published either."""
    from eptc.ir import folding

    fold = folding._fold
    done: list[str] = []

    def wrong(*arguments: Any) -> Any:
        off = 1.001 if "same" in done else 1.0
        return np.asarray(fold(*arguments), np.float32) * np.float32(off)

    def progress(event: Any) -> None:
        if event == "read the checkpoint":
            done.append(["all", "tone", "same", "multitask"][len(done)])

    monkeypatch.setattr(folding, "_fold", wrong)
    with pytest.raises(ParityError):
        eptc.export(
            small_native.ckpt, base=small_native.base, target="triton", task="tone,same",
            out=tmp_path / "out", progress=progress,
        )  # fmt: skip
    assert done == ["all", "tone", "same"], "the first engine was proven"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": None}, TaskError, "3 tasks, and none was chosen"),
        ({"task": "tone,tome"}, TaskError, "did you mean 'tone'"),
        ({"max_rank": 4}, OptionError, "--max-rank 4"),
        ({"precision": "int8-static"}, OptionError, "given no text"),
        (
            {"precision": "fp8", "optimize_for": "any", "calibration": "x"},
            OptionError,
            "--precision fp8 was given together with --target triton",
        ),
        (
            {"precision": "int8-fp16", "optimize_for": "any", "calibration": "x"},
            OptionError,
            "--precision int8-fp16 was given together with --target triton",
        ),
        ({"layout": "optimum"}, OptionError, "--layout optimum"),
        ({"target": "tritton"}, OptionError, "triton"),
    ],
)
def test_bad_options(
    small_native: Any, tmp_path: Path, options: dict[str, Any], error: type[EptcError], words: str
) -> None:
    given: dict[str, Any] = {"target": "triton", "task": "tone", **options}
    with pytest.raises(error, match=words):
        eptc.export(small_native.ckpt, base=small_native.base, out=tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "..", "Tone", "eptc.json", "multitask"])
def test_names_no_model_can_have(copy_native: Any, name: str) -> None:
    described = json.loads((copy_native.ckpt / "ept_config.json").read_text())
    described["tasks"][2]["name"] = name
    (copy_native.ckpt / "ept_config.json").write_text(json.dumps(described))
    path = copy_native.ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors = {n.replace("heads.score.", f"heads.{name}."): t for n, t in tensors.items()}
    path.unlink()
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(TaskError, match="can be called"):
        eptc.export(
            copy_native.ckpt, base=copy_native.base, target="triton", task="all",
            out=copy_native.out,
        )  # fmt: skip
    assert not copy_native.out.exists()


def test_where_no_engine_has_several_tasks(small_routed: Any, tmp_path: Path) -> None:
    """Its routes read the input: there is a model for each task, and a word of why no more."""
    made = eptc.export(
        small_routed.ckpt, base=small_routed.base, target="triton", task="tone,score",
        out=tmp_path / "out", verify=False,
    )  # fmt: skip
    assert set(made.parity) == {"tone", "score"}
    assert any("there is no model of several tasks" in warning for warning in made.warnings)
    assert sorted(path.name for path in made.path.iterdir()) == ["eptc.json", "score", "tone"]


def test_one_engine_is_another_target(small_native: Any, cli: Any, tmp_path: Path) -> None:
    given = ("export", small_native.ckpt, "--base", small_native.base, "--target", "triton")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "good"}\n{"text": "bad", "label": "bad"}\n')
    for more in (("--dry-run",), ("--precision", "all", "--data", rows)):
        refused = cli(*given, "--task", "tone", *more, "-o", tmp_path / "out")
        assert refused.code == 2
        assert "--target triton arranges engines" in refused.stderr


def test_the_command_line(small_native: Any, cli: Any, schema: Any, tmp_path: Path) -> None:
    given = ("export", small_native.ckpt, "--base", small_native.base, "--target", "triton")
    said = cli(*given, "--task", "tone,score", "-o", tmp_path / "out")
    assert said.code == 0, said.stderr
    assert "tone: parity passed" in said.stdout
    assert "score: parity passed" in said.stdout
    assert set(check_models(schema, tmp_path / "out")) == {"tone", "score", "multitask"}
    found = cli(*given, "--task", "0", "-o", tmp_path / "json", "--no-verify", "--json").json
    assert (found["target"], found["tasks"]) == ("triton", ["tone"])
    assert found["parity"]["tone"]["verified"] is False


# ---- what a configuration says of other graphs


@pytest.fixture(scope="module")
def manifest(repository: eptc.Folder) -> Manifest:
    return load_manifest(repository.path / "tone" / "1")


def graph(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...]) -> GraphSpec:
    return GraphSpec("model.onnx", inputs, outputs)


IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
LOGITS = TensorSpec("logits", "float32", ("batch", 2))


def test_a_number_for_each_row_has_a_dimension_for_triton(schema: Any, manifest: Manifest) -> None:
    """Such as the task of each row."""
    tasks = TensorSpec("task_ids", "int64", ("batch",))
    spec = graph(IDS, tasks, outputs=(LOGITS, TensorSpec("score", "float32", ("batch",))))
    config = parsed(schema, model_config("several", manifest, spec))
    assert config.max_batch_size == MAX_BATCH
    for tensor in (config.input[1], config.output[1]):
        assert list(tensor.dims) == [1]
        assert tensor.HasField("reshape")
        assert list(tensor.reshape.shape) == []
    assert requested(schema, config)["task_ids"].shape == (1,)


def test_without_rows_there_is_nothing_to_batch(schema: Any, manifest: Manifest) -> None:
    spec = graph(
        IDS, TensorSpec("scale", "float32", ()),
        outputs=(TensorSpec("logits", "float32", (1, "batch")),),
    )  # fmt: skip
    config = parsed(schema, model_config("whole", manifest, spec))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [list(tensor.dims) for tensor in config.input] == [[-1, -1], [1]]
    assert list(config.output[0].dims) == [1, -1]
    assert {name: feed.shape for name, feed in requested(schema, config).items()} == {
        "input_ids": (1, 8), "scale": (),
    }  # fmt: skip


def test_strangers_are_not_put_together_where_it_matters(schema: Any, manifest: Manifest) -> None:
    spec = graph(IDS, outputs=(LOGITS,))
    mixed = dataclasses.replace(manifest, routing=RoutingSpec("batch", reads_padding=True))
    config = parsed(schema, model_config("mixed", mixed, spec))
    assert config.max_batch_size == MAX_BATCH
    assert not config.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("provider", "kind"), [("cpu", "KIND_CPU"), ("cuda", "KIND_GPU"), ("any", "KIND_AUTO")]
)
def test_an_engine_runs_where_its_kernels_are(
    schema: Any, manifest: Manifest, provider: str, kind: str
) -> None:
    aimed = dataclasses.replace(manifest, optimized_for=provider)
    config = parsed(schema, model_config("aimed", aimed, graph(IDS, outputs=(LOGITS,))))
    assert schema.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind


def test_every_type_has_a_name(schema: Any, manifest: Manifest) -> None:
    inputs = [TensorSpec(dtype, dtype, ("batch", 3)) for dtype in DTYPES]
    config = parsed(schema, model_config("types", manifest, graph(*inputs, outputs=(LOGITS,))))
    names = [schema.DataType.Name(tensor.data_type) for tensor in config.input]
    assert len(set(names)) == len(DTYPES)
    assert dict(zip(DTYPES, names, strict=True))["bfloat16"] == "TYPE_BF16"


def test_labels_that_are_no_lines_are_left_out(schema: Any, manifest: Manifest) -> None:
    assert manifest.task is not None
    task = dataclasses.replace(manifest.task, labels=("a\nb", "c"))
    spec = graph(IDS, outputs=(LOGITS,))
    text = model_config("lines", dataclasses.replace(manifest, task=task), spec)
    assert parsed(schema, text).output[0].label_filename == ""
