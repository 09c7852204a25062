"""The engine: loading, providers, threads, closing, what it takes as text, what it imports."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import eptc.runtime
from eptc.errors import BundleError, InputError, OptionError, TaskError
from eptc.runtime import Engine, probe_providers
from eptc.runtime.providers import _does_not_start, choose

CPU = "CPUExecutionProvider"


def test_public_names() -> None:
    """`__all__` is what is there, sorted as the linter sorts it."""
    public = {name for name in vars(eptc.runtime) if not name.startswith("_")}
    modules = {name for name in public if type(vars(eptc.runtime)[name]) is type(sys)}
    assert set(eptc.runtime.__all__) == public - modules


IMPORT = """
import sys
import eptc.runtime
from eptc.runtime import Engine, verify
if len(sys.argv) > 1:
    verify(sys.argv[1]).raise_for_problems()
    with Engine.load(sys.argv[1]) as engine:
        engine.generate(["rain"]) if engine.manifest.generation else engine.classify(["rain"])
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes"}
print(sorted(heavy & set(sys.modules)))
print("onnxruntime" in sys.modules)
"""


@pytest.mark.parametrize("which", ["", "classifier", "writer"])
def test_imports(which: str, request: pytest.FixtureRequest) -> None:
    """Nothing of the compiler is loaded, and ONNX Runtime only with an engine."""
    path = [str(request.getfixturevalue(which).path)] if which else []
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT, *path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["[]", str(bool(which))]
    assert done.stderr == ""


def test_providers(classifier: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """`providers` is what started; looking for more is silent."""
    with Engine.load(classifier.path) as engine:
        assert engine.providers[-1] == CPU
        assert engine.classify(["the film"])
    names: Any
    for names in (["cpu"], ["CPU"], [CPU], [("cpu", {})], (CPU,)):
        with Engine.load(classifier.path, names) as engine:
            assert engine.providers == (CPU,)
    found = probe_providers()
    assert found[CPU] is None
    assert capfd.readouterr() == ("", "")


WRONG_PROVIDERS = {
    "unknown": (["tpu"], "tpu cannot start"),
    "misspelt": (["CUDAExecutionprovider"], "built without it"),
    "a string": ("cpu", "providers is 'cpu'"),
    "none": ([], "providers is []"),
    "a number": ([1], "a provider is 1"),
}


@pytest.mark.parametrize(("names", "message"), WRONG_PROVIDERS.values(), ids=WRONG_PROVIDERS)
def test_wrong_providers(classifier: Any, names: Any, message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        Engine.load(classifier.path, names)
    assert message in refusal.value.found
    assert "cpu" in str(refusal.value).lower()


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_asked_for_but_not_there(
    classifier: Any, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A provider that cannot start is an error with the reason and what can, not a fallback."""
    full = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[name]
    if probe_providers().get(full, "") is None:
        pytest.skip(f"{full} starts on this machine")
    with pytest.raises(OptionError, match="cannot start: ") as refusal:
        Engine.load(classifier.path, [name, "cpu"])
    assert CPU in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_starting_a_provider() -> None:
    """Once the libraries are found, the provider itself has the last word."""
    assert _does_not_start(CPU) is None
    for name, reason in probe_providers().items():
        assert (_does_not_start(name) is None) == (reason is None)


@pytest.mark.gpu
def test_cuda(cuda: str, request: pytest.FixtureRequest, sentences: Any) -> None:
    """On a CUDA device the same tokens are written, the cache staying on the device."""
    assert cuda
    lowered_llama = request.getfixturevalue("lowered_llama")  # made only where it is used
    with Engine.load(lowered_llama.path, ["cpu"]) as engine:
        expected = engine.generate(sentences)
    with Engine.load(lowered_llama.path, ["cuda"]) as engine:
        assert engine.providers[0] == "CUDAExecutionProvider"
        assert engine.generate(sentences) == expected


def test_provider_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 stays float32 on a GPU, unless the caller wants it otherwise."""
    monkeypatch.setattr("eptc.runtime.providers.why_not", lambda _: None)
    cuda = "CUDAExecutionProvider"
    assert dict(choose(None))[cuda] == {"use_tf32": "0"}
    assert choose(["cuda"]) == [(cuda, {"use_tf32": "0"})]
    options = {"device_id": "1", "use_tf32": "1"}
    assert choose([("cuda", options), "cpu"]) == [(cuda, options), (CPU, {})]


def test_tensorrt_is_for_bundles_that_were_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eptc.runtime.providers.why_not", lambda _: None)
    names = ["CUDAExecutionProvider", CPU]
    assert [name for name, _ in choose(None)] == names
    made_for_it = [name for name, _ in choose(None, for_tensorrt=True)]
    assert made_for_it == ["TensorrtExecutionProvider", *names]


def test_a_provider_that_fails_after_all(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the engine goes on with the rest; asked for by name, it is an error."""
    reason = probe_providers().get("CUDAExecutionProvider")
    monkeypatch.setattr("eptc.runtime.providers.why_not", lambda _: None)
    with Engine.load(classifier.path) as engine:
        assert engine.providers[-1] == CPU
    if reason is not None:
        with pytest.raises((OptionError, BundleError)):
            Engine.load(classifier.path, ["cuda"])


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_wrong_threads(classifier: Any, threads: Any) -> None:
    with pytest.raises(OptionError, match="threads is"):
        Engine.load(classifier.path, ["cpu"], threads)


def test_threads(classifier: Any) -> None:
    with Engine.load(classifier.path, ["cpu"], threads=1) as engine:
        assert engine.classify(["the film"])


def test_repr_and_close(classifier: Any) -> None:
    """A closed engine says so, whatever it is asked."""
    engine = Engine.load(classifier.path, ["cpu"])
    assert repr(engine) == (
        f"<Engine encoder-classifier task='sentiment' fp32 on {CPU}: {classifier.path}>"
    )
    feeds = engine.tokenize(["the film"])
    with engine as same:
        assert same is engine
    engine.close()
    assert "closed" in repr(engine)
    for call in (
        lambda: engine.classify(["x"]),
        lambda: engine.classify([]),
        lambda: engine.tokenize(["x"]),
        lambda: engine.run(feeds),
    ):
        with pytest.raises(InputError, match="closed"):
            call()


WRONG_TEXTS: dict[str, tuple[Any, str]] = {
    "a string": ("the film", "the texts are 'the film' (str)"),
    "bytes": (b"the film", "the texts are b'the film'"),
    "a dict": ({"text": "the film"}, "the texts are {"),
    "None": (None, "the texts are None"),
    "a number": (3, "the texts are 3"),
    "a number inside": (["the film", 3], "text 1 is 3 (int)"),
    "None inside": ([None], "text 0 is None"),
    "bytes inside": ([b"the film"], "text 0 is b'the film'"),
    "a pair": ([("the film", "rain")], "text 0: an example is ('the film', 'rain')"),
    "another field": ([{"sentence": "the film"}], "text 0: an example has the fields"),
    "a field that is no text": ([{"text": 3}], "text 0: an example is {'text': 3}"),
    "half a character": (["the film", "\ud800"], "text 1 is not valid Unicode"),
    "too long": (["rain", "rain " * 30], "text 1 has "),
}


@pytest.mark.parametrize(("texts", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_wrong_texts(classifier: Any, texts: Any, message: str) -> None:
    """What is no text is named by its position; a string is not read letter by letter."""
    with Engine.load(classifier.path, ["cpu"]) as engine:
        for call in (engine.classify, engine.tokenize):
            with pytest.raises((InputError, TaskError)) as refusal:
                call(texts)
            assert message in refusal.value.found


def test_texts_of_any_iterable(classifier: Any) -> None:
    """Generators and tuples are lists of texts; unread fields of a dict do not count."""
    with Engine.load(classifier.path, ["cpu"]) as engine:
        expected = engine.classify(["rain", "the film"])
        assert engine.classify(("rain", "the film")) == expected
        assert engine.classify(text for text in ("rain", "the film")) == expected
        assert engine.classify([{"text": "rain", "label": 1}])[0].label == expected[0].label
        with pytest.raises(InputError, match="no texts"):
            engine.tokenize([])
        assert engine.classify(["rain " * 30], truncate=True)
        for wrong in (0, True, "2"):
            with pytest.raises(OptionError, match="batch_size"):
                engine.classify(["rain"], batch_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["classifier", "writer", "lowered_t5"])
def test_concurrent(which: str, request: pytest.FixtureRequest, sentences: Any) -> None:
    """Calls from several threads, cut and not, of any size, are answered as one by one."""
    with Engine.load(request.getfixturevalue(which).path, ["cpu"], threads=1) as engine:
        ask: Any = engine.classify if which == "classifier" else engine.generate
        calls = [
            [text + " " + other for text in sentences[: 1 + i % 4]]
            for i in range(24)
            for other in ("rain", "the cat")
        ]
        expected = [ask(call, truncate=True) for call in calls]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda call: ask(call, truncate=True), calls)) == expected


def test_without_a_tokenizer(classifier: Any, tmp_path: Any, rewrite: Any) -> None:
    """Such a bundle still runs on arrays."""
    for name in ("model.onnx", "weights.bin"):
        (tmp_path / name).write_bytes((classifier.path / name).read_bytes())
    rewrite(tmp_path, "encoder-classifier", num_labels=3)
    with Engine.load(tmp_path, ["cpu"]) as engine:
        with pytest.raises(InputError, match="no tokenizer"):
            engine.classify(["the film"])
        ones = [[1, 1]]
        feeds = {"input_ids": ones, "attention_mask": ones, "token_type_ids": ones}
        assert engine.run(feeds)["logits"].shape == (1, 3)
