"""Options of the TensorRT provider, and engines kept by what they are for: plain data."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from eptc.errors import BundleError, OptionError
from eptc.runtime import GraphSpec, TensorSpec, load_manifest
from eptc.runtime.engine_cache import Builder, keep, publish, this_builder
from eptc.runtime.engine_sessions import open_with_engines, uncached
from eptc.runtime.gpu import find_driver
from eptc.runtime.tensorrt import TensorRtOptions, profile_options, read_profiles

SPEC = GraphSpec(
    "model.onnx",
    (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("past", "float32", ("batch", 2, "past_sequence", 8)),
        TensorSpec("scale", "float32", (1,)),
    ),
    (),
)
SHAPES = {
    "input_ids": {"min": [1, 1], "opt": [8, 64], "max": [32, 128]},
    "past": {"min": [1, 2, 0, 8], "opt": [8, 2, 10, 8], "max": [32, 2, 20, 8]},
}
# Of the toy classifier's three inputs.
TEXTS = {
    name: {"min": [1, 1], "opt": [8, 8], "max": [32, 16]}
    for name in ("input_ids", "attention_mask", "token_type_ids")
}
HERE = Builder("NVIDIA A10G", "8.6", "570.86.10", "10.9.0", "1.31.1")


def test_profiles_as_options() -> None:
    assert profile_options(SHAPES, SPEC) == {
        "trt_profile_min_shapes": "input_ids:1x1,past:1x2x0x8",
        "trt_profile_opt_shapes": "input_ids:8x64,past:8x2x10x8",
        "trt_profile_max_shapes": "input_ids:32x128,past:32x2x20x8",
    }


PROFILES: dict[str, tuple[dict[str, Any], str]] = {
    "one too few": ({"past": None}, "lacks the input 'past'"),
    "one too many": ({"scale": SHAPES["input_ids"]}, "has the input 'scale'"),
    "no opt": ({"input_ids": {"min": [1, 1], "max": [2, 2]}}, "the profile of 'input_ids' is"),
    "no dict": ({"input_ids": 3}, "the profile of 'input_ids' is 3"),
    "rank": ({"input_ids": {k: [1] for k in ("min", "opt", "max")}}, "has [1]"),
    "text": ({"input_ids": {k: ["1", "2"] for k in ("min", "opt", "max")}}, "has ['1', '2']"),
    "negative": ({"input_ids": {k: [1, -1] for k in ("min", "opt", "max")}}, "has [1, -1]"),
    "a fixed size": (
        {"past": {k: [1, 3, 4, 8] for k in ("min", "opt", "max")}}, "has [1, 3, 4, 8]",
    ),
    "a smaller fixed size": (
        {"past": {k: [1, 1, 4, 8] for k in ("min", "opt", "max")}}, "has [1, 1, 4, 8]",
    ),
    "out of order": (
        {"input_ids": {"min": [1, 9], "opt": [8, 8], "max": [8, 16]}}, "[1, 9]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), PROFILES.values(), ids=PROFILES)
def test_wrong_profiles(changed: dict[str, Any], message: str) -> None:
    shapes = {key: value for key, value in {**SHAPES, **changed}.items() if value is not None}
    with pytest.raises(OptionError) as refusal:
        profile_options(shapes, SPEC)
    assert message in refusal.value.found


def test_profiles_that_are_no_mapping() -> None:
    for given in (3, [["input_ids"]], "input_ids"):
        with pytest.raises(OptionError, match="the profile is"):
            profile_options(given, SPEC)  # type: ignore[arg-type]


def test_options_of_a_graph(tmp_path: Path) -> None:
    """Friendly names become the provider's; kernels follow the precision that was verified."""
    settings = TensorRtOptions.read({
        "workspace_gb": 1.5, "profiles": {"model": SHAPES}, "trt_builder_optimization_level": 5,
        "device_id": 1,
    })  # fmt: skip
    assert settings.device == 1
    found = settings.for_graph(tmp_path, "model", SPEC, "fp16")
    assert found == {
        "trt_fp16_enable": "1", "trt_max_workspace_size": str(3 << 29),
        **profile_options(SHAPES, SPEC), "trt_builder_optimization_level": 5, "device_id": 1,
    }  # fmt: skip
    shorter = {"trt_profile_max_shapes": "input_ids:2x2"}  # of the provider's own, it wins
    found = TensorRtOptions.read({"profiles": {"model": SHAPES}, **shorter}).for_graph(
        tmp_path, "model", SPEC, "fp32"
    )
    assert found == {**profile_options(SHAPES, SPEC), **shorter}
    plain = TensorRtOptions.read({})
    assert plain.for_graph(tmp_path, "model", SPEC, "fp32") == {}
    assert plain.for_graph(tmp_path, "model", SPEC, "int8-static") == {"trt_int8_enable": "1"}
    both = {"trt_int8_enable": "1", "trt_fp16_enable": "1"}
    assert plain.for_graph(tmp_path, "model", SPEC, "int8-fp16") == both
    assert plain.for_graph(tmp_path, "model", SPEC, "bf16") == {"trt_bf16_enable": "1"}
    with pytest.raises(OptionError, match="no profile of graph 'decoder'"):
        settings.for_graph(tmp_path, "decoder", SPEC, "fp32")


def test_options_that_say_nothing_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of the user's home, and what is off by default."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TensorRtOptions.read({"cache": "~/engines"}).cache == tmp_path / "engines"
    for off in ("0", 0, "False", False):
        assert TensorRtOptions.read({"trt_cuda_graph_enable": off}).cache is None


def test_profiles_of_the_bundle(tmp_path: Path) -> None:
    """Where `--target tensorrt` wrote shapes they are taken, unless others are given."""
    assert read_profiles(tmp_path) is None
    data = {"schema_version": 1, "graphs": {"model": {"file": "model.onnx", "inputs": SHAPES}}}
    (tmp_path / "profiles.json").write_text(json.dumps(data))
    found = TensorRtOptions.read({}).for_graph(tmp_path, "model", SPEC, "fp32")
    assert found == profile_options(SHAPES, SPEC)
    (tmp_path / "profiles.json").write_text('{"graphs": {"model": {}}}')
    with pytest.raises(OptionError, match=r"profiles\.json cannot be read"):
        read_profiles(tmp_path)


OPTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt": ({"cahce": "x"}, "no option 'cahce': did you mean 'cache'?", "trt_"),
    "unknown": ({"fast": 1}, "no option 'fast'", "workspace_gb"),
    "its own cache": (
        {"trt_engine_cache_path": "x"}, "without saying what they are for", "give 'cache'",
    ),
    "its own context": ({"trt_dump_ep_context_model": "1"}, "without saying", "give 'context'"),
    "both": ({"cache": "x", "context": "y"}, "both given", "leave one out"),
    "no memory": ({"workspace_gb": 0}, "workspace_gb is 0", "above 0"),
    "memory in words": ({"workspace_gb": "2"}, "workspace_gb is '2'", "above 0"),
    "no end of memory": ({"workspace_gb": float("inf")}, "workspace_gb is inf", "above 0"),
    "no device": ({"device_id": "first"}, "device_id is 'first'", "the number of a GPU"),
    "a device below 0": ({"device_id": -1}, "device_id is -1", "the number of a GPU"),
    "profiles in a file": ({"profiles": "model.json"}, "profiles is 'model.json'", "min, opt"),
    "captured": ({"trt_cuda_graph_enable": "True"}, "every other", "enable_cuda_graph"),
    "no folder": ({"cache": 3}, "'cache' is 3", "a folder"),
    "an empty folder": ({"context": ""}, "'context' is ''", "a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "found", "rest"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_options(options: dict[str, Any], found: str, rest: str) -> None:
    with pytest.raises(OptionError) as refusal:
        TensorRtOptions.read(options)
    assert found in refusal.value.found
    assert rest in str(refusal.value)


@pytest.fixture
def bundle(classifier: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(classifier.path, folder)
    return folder


def kept(bundle: Path, builder: Builder = HERE, **options: Any) -> Any:
    manifest = load_manifest(bundle)
    return keep(TensorRtOptions.read(options), bundle, manifest, "model", builder)


def test_a_cache_for_each_machine(bundle: Path, tmp_path: Path) -> None:
    """Another GPU, driver, TensorRT, bundle or option finds an empty folder of its own."""
    cache = tmp_path / "engines"
    first = kept(bundle, cache=cache)
    assert first.graph == bundle / "model.onnx"
    entry = Path(first.options["trt_engine_cache_path"])
    assert entry.parent == cache
    assert first.options["trt_engine_cache_enable"] == "1"
    assert first.options["trt_timing_cache_enable"] == "1"
    assert Path(first.options["trt_timing_cache_path"]).is_dir()
    record = json.loads((entry / "record.json").read_text())
    assert record["builder"] == dataclasses.asdict(HERE)
    assert set(record["files"]) >= {"model.onnx", "weights.bin"}
    (entry / "model.engine").write_bytes(b"built")
    again = kept(bundle, cache=cache)
    assert (first.engine, again.engine) == (None, entry)
    assert again.options == first.options
    others, timings = {entry}, {first.options["trt_timing_cache_path"]}
    for change in (
        {"gpu": "NVIDIA L4"}, {"compute_capability": "8.9"}, {"driver": "550.1"},
        {"tensorrt": "10.3.0"}, {"onnxruntime": "1.24.0"},
    ):  # fmt: skip
        other = kept(bundle, dataclasses.replace(HERE, **change), cache=cache)
        others.add(Path(other.options["trt_engine_cache_path"]))
        timings.add(other.options["trt_timing_cache_path"])
    assert len(timings) == 6
    larger = kept(bundle, cache=cache, workspace_gb=1).options
    others.add(Path(larger["trt_engine_cache_path"]))
    assert len(others) == 7
    assert larger["trt_timing_cache_path"] in timings  # which all graphs of a machine share
    stream = kept(bundle, cache=cache, user_compute_stream="123")
    assert stream.options["trt_engine_cache_path"] == str(entry)


def test_a_cache_that_was_moved(bundle: Path, tmp_path: Path) -> None:
    """Engines copied to where others would be looked for are refused, and named."""
    cache = tmp_path / "engines"
    theirs = kept(bundle, dataclasses.replace(HERE, gpu="NVIDIA L4"), cache=cache)
    ours = kept(bundle, cache=cache)
    place = Path(ours.options["trt_engine_cache_path"])
    shutil.rmtree(place)
    shutil.copytree(theirs.options["trt_engine_cache_path"], place)
    with pytest.raises(OptionError, match="built for another GPU: NVIDIA L4") as refusal:
        kept(bundle, cache=cache)
    assert "GPU NVIDIA A10G" in str(refusal.value)
    (place / "record.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        kept(bundle, cache=cache)
    (place / "record.json").unlink()
    (place / "model.engine").write_bytes(b"whose?")
    with pytest.raises(OptionError, match="does not say what it is for"):
        kept(bundle, cache=cache)


def test_a_context_is_made_once(bundle: Path, tmp_path: Path) -> None:
    """The first time TensorRT is told to write one; from then on it is what is opened."""
    options: dict[str, Any] = {
        "context": tmp_path / "contexts", "profiles": {"model": TEXTS},
    }  # fmt: skip
    first = kept(bundle, **options)
    model = tmp_path / "contexts" / "model_ctx.onnx"
    assert first.graph == bundle / "model.onnx"
    assert first.options["trt_dump_ep_context_model"] == "1"
    assert first.options["trt_ep_context_embed_mode"] == "1"
    built(first)
    second = kept(bundle, **options)
    assert (second.graph, second.engine) == (model, model)
    assert second.record is None
    assert "trt_dump_ep_context_model" not in second.options
    model.unlink()
    assert kept(bundle, **options).record == first.record


def built(kept: Any) -> None:
    """Do what ONNX Runtime does with such options, and what follows."""
    Path(kept.options["trt_ep_context_file_path"]).write_bytes(b"written by TensorRT")
    publish("model", kept.context, kept.record)


def test_contexts_made_at_the_same_time(bundle: Path, tmp_path: Path) -> None:
    """Each is written beside the others and put in place whole; one of them stays."""
    folder = tmp_path / "contexts"
    options: dict[str, Any] = {"context": folder, "profiles": {"model": TEXTS}}
    both = [kept(bundle, **options), kept(bundle, **options)]
    files = {each.options["trt_ep_context_file_path"] for each in both}
    assert len(files | {str(folder / "model_ctx.onnx")}) == 3
    for each in both:
        built(each)
    assert sorted(path.name for path in folder.iterdir()) == ["model_ctx.json", "model_ctx.onnx"]
    with pytest.raises(OptionError, match="wrote no EP-context model of graph 'model'"):
        publish("model", both[0].context, both[0].record)


def test_caches_made_at_the_same_time(bundle: Path, tmp_path: Path) -> None:
    """Nor does one that was killed before it had written its record stand in the way."""
    cache = tmp_path / "engines"
    entry = Path(kept(bundle, cache=cache).options["trt_engine_cache_path"])
    (entry / "record.json").rename(entry / "record.json.unfinished")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept(bundle, cache=cache), range(64)))
    assert {each.options["trt_engine_cache_path"] for each in found} == {str(entry)}
    assert json.loads((entry / "record.json").read_text()) == found[0].record


_KILLED = """
import os, pathlib, signal, sys
from eptc.runtime import load_manifest
from eptc.runtime.engine_cache import Builder, keep
from eptc.runtime.tensorrt import TensorRtOptions
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bundle, cache, *here = sys.argv[1:]
settings = TensorRtOptions.read({"cache": cache})
keep(settings, pathlib.Path(bundle), load_manifest(bundle), "model", Builder(*here))
"""


def test_a_process_killed_while_it_writes_a_record(bundle: Path, tmp_path: Path) -> None:
    """What it left is no record, and goes with the next one."""
    cache = tmp_path / "engines"
    arguments = [bundle, cache, *dataclasses.astuple(HERE)]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *map(str, arguments)])
    assert killed.returncode == -signal.SIGKILL
    (left,) = cache.glob("*/.*")
    entry = Path(kept(bundle, cache=cache).options["trt_engine_cache_path"])
    assert left.parent == entry
    assert [path.name for path in entry.iterdir()] == ["record.json"]


def test_an_engine_that_does_not_load(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be removed is said; of one that is built now there is nothing to remove."""
    if not isinstance(find_driver(), str):
        pytest.skip("needs a machine without a GPU, on which no engine loads")
    monkeypatch.setattr("eptc.runtime.engine_sessions.this_builder", lambda _: HERE)
    cache = tmp_path / "engines"
    entry = Path(kept(bundle, cache=cache).options["trt_engine_cache_path"])
    requests = [("TensorrtExecutionProvider", {"cache": cache})]

    def refused() -> str:
        with pytest.raises((BundleError, OptionError)) as refusal:
            open_with_engines(bundle, load_manifest(bundle), "model", requests, 1)
        return str(refusal.value)

    assert "half an engine" not in refused()
    (entry / "model.engine").write_bytes(b"half")
    assert f"remove {entry}: a process that was killed" in refused()


def test_a_damaged_bundle_is_not_kept(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine would outlive it, under the sound one's name."""
    monkeypatch.setattr("eptc.runtime.engine_sessions.this_builder", lambda _: HERE)
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[-1] ^= 1
    (bundle / "weights.bin").write_bytes(bytes(data))
    requests = [("TensorrtExecutionProvider", {"cache": tmp_path / "engines"})]
    with pytest.raises(BundleError, match=r"weights\.bin is not what was written"):
        open_with_engines(bundle, load_manifest(bundle), "model", requests, 1)


CHANGES = {
    "gpu": ("NVIDIA L4", "another GPU: NVIDIA A10G"),
    "compute_capability": ("8.9", "another compute capability: 8.6"),
    "tensorrt": ("10.3.0", "another TensorRT: 10.9.0"),
    "driver": ("550.54.15", "another driver: 570.86.10"),
    "onnxruntime": ("1.24.0", "another ONNX Runtime: 1.31.1"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_context_of_another_machine(bundle: Path, tmp_path: Path, field: str) -> None:
    value, message = CHANGES[field]
    options: dict[str, Any] = {"context": tmp_path / "c", "profiles": {"model": TEXTS}}
    first = kept(bundle, **options)
    built(first)
    with pytest.raises(OptionError, match=message) as refusal:
        kept(bundle, dataclasses.replace(HERE, **{field: value}), **options)
    assert value in str(refusal.value)
    assert "it is built again" in str(refusal.value)


def test_a_context_of_another_bundle(bundle: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"context": tmp_path / "c", "profiles": {"model": TEXTS}}
    first = kept(bundle, **options)
    built(first)
    place = tmp_path / "c" / "model_ctx.json"
    place.write_text(json.dumps({**first.record, "files": {"weights.bin": "0" * 64}}))
    with pytest.raises(OptionError, match="another bundle, or with other options"):
        kept(bundle, **options)
    place.unlink()
    with pytest.raises(OptionError, match="does not say what it is for"):
        kept(bundle, **options)


def test_a_context_without_shapes(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no shapes to build it for") as refusal:
        kept(bundle, context=tmp_path / "c")
    assert "--target tensorrt" in str(refusal.value)


def test_a_folder_that_cannot_be_written(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written"):
        kept(bundle, cache=tmp_path / "file")
    with pytest.raises(OptionError, match="cannot be written"):
        kept(bundle, context=tmp_path / "file" / "c", profiles={"model": TEXTS})


def test_folded_engines_are_not_kept() -> None:
    tensorrt, cpu = "TensorrtExecutionProvider", ("CPUExecutionProvider", {"use_arena": "0"})
    options = {"trt_sparsity_enable": "1", "workspace_gb": 2}
    assert uncached([(tensorrt, options), cpu], "fp16") == [
        (
            tensorrt,
            {
                "trt_fp16_enable": "1",
                "trt_max_workspace_size": str(2 << 30),
                "trt_sparsity_enable": "1",
            },
        ),
        cpu,
    ]
    for own in ({"cache": "x"}, {"context": "x"}, {"profiles": {"model": TEXTS}}):
        with pytest.raises(OptionError, match="a folded task"):
            uncached([(tensorrt, own)], "fp32")


def test_this_builder() -> None:
    """On a machine with a GPU it is named; without one the reason is."""
    driver = find_driver()
    if isinstance(driver, str):
        with pytest.raises(OptionError, match="TensorRT's engines cannot be kept"):
            this_builder(0)
        return
    with pytest.raises((OptionError, BundleError), match=r"device_id is 99|libraries"):
        this_builder(99)
